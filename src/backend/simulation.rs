//! Some virtual minutes of calls against a backend and an Entra that misbehave, over and over, each time by another seed.
//!
//! What runs is [`BackendClient`] with its retries, budget, breaker, deadlines and the real token source; made up are the wire, the
//! authority and the clock, which stands still while anything can happen without it. Each test below is an invariant that holds
//! over all seeds. A failure names its seed: `SIMULATION_SEED=17 cargo test --lib simulation` runs that one alone, a hundred times,
//! for one thing is not ours to seed: in which order tokio wakes those who waited for the same token.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicUsize;
use std::sync::{LazyLock, Mutex, OnceLock, Weak};

use futures_util::future::BoxFuture;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::identity::simulated::{self, Answer};
use crate::telemetry::trace::TraceContext;

/// In the place of the network: takes a request, gives a response or an error.
pub(super) type Wire = Box<dyn Fn(Request) -> BoxFuture<'static, reqwest::Result<Response>> + Send + Sync>;

impl BackendClient {
    pub(super) async fn execute(&self, outgoing: Request) -> reqwest::Result<Response> {
        match &self.wire {
            Some(wire) => wire(outgoing).await,
            None => self.http.execute(outgoing).await,
        }
    }

    /// A client of a backend that is made up.
    pub(super) fn simulated(settings: &BackendSettings, identity: Arc<TokenSource>, wire: Wire) -> Self {
        // Its TLS roots take longer to read than a simulation takes.
        static HTTP: LazyLock<reqwest::Client> = LazyLock::new(unreachable_network);
        let metrics = Arc::new(Metrics::new(&[], &Route::TEMPLATES));
        Self { wire: Some(wire), ..Self::with_client(HTTP.clone(), settings, identity, metrics) }
    }
}

/// A real client for which no name exists: the source of real errors.
fn unreachable_network() -> reqwest::Client {
    struct NoSuchName;
    impl reqwest::dns::Resolve for NoSuchName {
        fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
            Box::pin(async { Err(std::io::Error::other("no such name").into()) })
        }
    }
    reqwest::Client::builder().no_proxy().dns_resolver(Arc::new(NoSuchName)).build().unwrap()
}

/// The error of a connection that could not be had.
pub(super) async fn refused() -> reqwest::Error {
    static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(unreachable_network);
    CLIENT.get("http://nowhere.example/").send().await.unwrap_err()
}

/// An error that is none of connecting, as of a connection that broke.
pub(super) fn reset() -> reqwest::Error {
    static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(unreachable_network);
    CLIENT.get("no address").build().unwrap_err()
}

const SEEDS: u64 = 1_000;
const VIRTUAL_TIME: Duration = Duration::from_secs(120);
/// After an outage: the token source's longest cool-down after an exchange that hung until then. The breaker's longest pause, and the
/// token source's pause between forced refreshes, are shorter.
const HEALING: Duration = Duration::from_secs(40);
/// The clock's own grain, twice: deadlines are rounded up to it.
const TICK: Duration = Duration::from_millis(2);
const RESPONSE_LIMIT: usize = 1_024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Invariant {
    OneTicket,
    SurelyNotHappened,
    FateIsTold,
    NotInvitedTwice,
    Outcome,
    Isolation,
    Amplification,
    Deadline,
    OneExchangeWithEntra,
    OneProbe,
    NothingStuck,
    Healing,
    OwnAnswer,
    NoPanic,
}

/// What the weather does to an exchange with the backend.
#[derive(Debug, Clone, Copy)]
enum Weather {
    Fair,
    Slow,
    Crawling,
    Lossy,
    Failing,
    Throttling,
    Refusing,
    /// Some requests get a 401, whatever their token is.
    Moody,
    Down,
    Hanging,
    /// The status arrives, the body does not.
    Stalling,
    /// Answers lack fields, or everything.
    Thin,
    Odd,
    All,
}

#[derive(Debug, Clone, Copy)]
enum EntraWeather {
    Fair,
    Down,
    Misconfigured,
    Throttling,
    Hanging,
    ShortLived,
}

/// How the backend treats one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// No connection.
    Unreachable,
    /// The connection breaks, before or after the work is done.
    Reset {
        done: bool,
    },
    /// The same after the head of the answer.
    BrokenBody {
        done: bool,
    },
    /// An error status, before or after the work is done.
    Status {
        status: u16,
        retry_after: Option<u64>,
        done: bool,
    },
    /// A status whose body never comes, before or after the work is done.
    Stalled {
        status: u16,
        done: bool,
    },
    /// A success with this body.
    Thin(&'static str),
    /// A success that nobody can read.
    Garbage,
    /// A success that is too large.
    Endless,
    /// No answer, ever.
    Silence {
        done: bool,
    },
    Success,
}

impl Treatment {
    fn does_the_work(self) -> bool {
        match self {
            Self::Unreachable => false,
            Self::Reset { done }
            | Self::BrokenBody { done }
            | Self::Silence { done }
            | Self::Status { done, .. }
            | Self::Stalled { done, .. } => done,
            Self::Thin(_) | Self::Garbage | Self::Endless | Self::Success => true,
        }
    }

    /// Whether the backend has said that it did nothing.
    fn refuses(self) -> bool {
        let status = match self {
            Self::Status { status, .. } | Self::Stalled { status, .. } => status,
            _ => return false,
        };
        (400..500).contains(&status) && status != 408
    }
}

/// One call, as the world outside sees it.
#[derive(Default)]
struct Story {
    exchanges: u64,
    /// Requests that reached the backend, and whether each was refused and the client knows.
    arrivals: Vec<bool>,
    /// Requests that reached the backend and were not refused.
    perhaps_done: u32,
    /// The work that was done, by key.
    tickets: BTreeMap<String, u32>,
    keys: BTreeSet<String>,
    /// 401 answers in a row.
    unauthorized: u32,
}

/// What decides by chance. Each actor has one of its own, so that their order does not change what happens to them.
struct Dice(fastrand::Rng);

impl Dice {
    fn new(seed: u64, actor: u64, turn: u64) -> Self {
        Self(fastrand::Rng::with_seed((seed << 40) ^ (actor << 12) ^ turn))
    }

    fn one_in(&mut self, sides: u32) -> bool {
        self.0.u32(..sides) == 0
    }

    fn percent(&mut self, percent: u32) -> bool {
        self.0.u32(..100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.usize(..from.len())]
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.0.u64(from..=to))
    }
}

/// Calls from this number on ask for the one resource that fails.
const POISON: u64 = 1 << 32;

/// What a call asks for.
fn resource(call: u64) -> String {
    if call < POISON { call.to_string() } else { "broken".to_owned() }
}

/// Actors that are no calls.
const WEATHER: u64 = 1 << 20;
const ENTRA: u64 = 2 << 20;
const CALLERS: u64 = 3 << 20;

struct World {
    seed: u64,
    begun: Instant,
    /// Entra is well, and no token is revoked: nobody ever waits for one.
    steady_token: bool,
    /// The weather does not change and there are many calls: only that shows what is granted once and what for ever.
    lasting: bool,
    /// All is well but for one resource, which one caller asks for all the time.
    poisoned: Option<Treatment>,
    weather: Mutex<(Weather, EntraWeather)>,
    /// The backend refuses tokens with a smaller number.
    revoked_below: AtomicU32,
    tokens: AtomicU32,
    exchanges: AtomicU32,
    stories: Mutex<BTreeMap<u64, Story>>,
    calls: AtomicU32,
    retries: AtomicU32,
    /// Of reads, and of writes: each route has a breaker of its own.
    probes: [AtomicUsize; 2],
    at_entra: AtomicUsize,
    client: OnceLock<Weak<BackendClient>>,
    settings: BackendSettings,
    blame: Mutex<Vec<(Invariant, String)>>,
    /// What happened and when, to compare two runs of one seed.
    history: Mutex<Vec<(u128, u64, &'static str)>>,
}

/// Counts something as going on until it is dropped.
struct Counted(Arc<World>, fn(&World) -> &AtomicUsize);

impl Counted {
    fn new(world: &Arc<World>, of: fn(&World) -> &AtomicUsize) -> (Self, usize) {
        let before = of(world).fetch_add(1, Relaxed);
        (Self(Arc::clone(world), of), before + 1)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1(&self.0).fetch_sub(1, Relaxed);
    }
}

impl World {
    fn new(seed: u64, steady_token: bool) -> Arc<Self> {
        let mut dice = Dice::new(seed, 0, 0);
        let settings = BackendSettings {
            timeout: Duration::from_secs(dice.pick(&[2, 5, 10])),
            max_response_bytes: RESPONSE_LIMIT,
            max_concurrency: dice.pick(&[2, 8, 512, 512]),
            max_attempts: dice.pick(&[1, 2, 3, 3, 5]),
            retry_percent: dice.pick(&[0, 20, 20, 20]),
            retry_floor: dice.pick(&[0, 1, 1, 10]),
            circuit_breaker: !dice.one_in(4),
            idempotent_creates: dice.one_in(4),
            ..BackendSettings::new(Url::parse("http://backend.example/api/v1").unwrap())
        };
        Arc::new(Self {
            seed,
            begun: Instant::now(),
            steady_token,
            lasting: dice.one_in(5),
            poisoned: None,
            weather: Mutex::new((Weather::Fair, EntraWeather::Fair)),
            revoked_below: AtomicU32::new(0),
            tokens: AtomicU32::new(0),
            exchanges: AtomicU32::new(0),
            stories: Mutex::default(),
            calls: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            probes: Default::default(),
            at_entra: AtomicUsize::new(0),
            client: OnceLock::new(),
            settings,
            blame: Mutex::default(),
            history: Mutex::default(),
        })
    }

    /// A world in which one caller asks for a resource that is always treated so.
    fn poisoned(seed: u64, treatment: Treatment) -> Arc<Self> {
        let mut world = Self::new(seed, true);
        if let Some(world) = Arc::get_mut(&mut world) {
            world.poisoned = Some(treatment);
            world.lasting = false;
            world.settings.circuit_breaker = true;
            world.settings.max_concurrency = 1_024;
        }
        world
    }

    fn client(self: &Arc<Self>) -> Arc<BackendClient> {
        let world = Arc::clone(self);
        let identity = simulated::token_source(move || Arc::clone(&world).entra());
        let world = Arc::clone(self);
        let wire = move |request| -> BoxFuture<'static, _> { Box::pin(Arc::clone(&world).carry(request)) };
        let client = Arc::new(BackendClient::simulated(&self.settings, identity, Box::new(wire)));
        let _ = self.client.set(Arc::downgrade(&client));
        client
    }

    fn blame(&self, invariant: Invariant, what: String) {
        let at = self.begun.elapsed().as_secs_f64();
        self.blame.lock().unwrap().push((invariant, format!("seed {}, at {at:.3} s: {what}", self.seed)));
    }

    fn note(&self, call: u64, what: &'static str) {
        self.history.lock().unwrap().push((self.begun.elapsed().as_nanos(), call, what));
    }

    fn story<T>(&self, call: u64, tell: impl FnOnce(&mut Story) -> T) -> T {
        tell(self.stories.lock().unwrap().entry(call).or_default())
    }

    /// One exchange with Entra.
    async fn entra(self: Arc<Self>) -> Answer {
        let (_guard, at_once) = Counted::new(&self, |world| &world.at_entra);
        if at_once > 1 {
            self.blame(Invariant::OneExchangeWithEntra, format!("{at_once} exchanges at once"));
        }
        self.note(0, "entra");
        let mut dice = Dice::new(self.seed, ENTRA, self.exchanges.fetch_add(1, Relaxed).into());
        let weather = self.weather.lock().unwrap().1;
        sleep(dice.millis(20, 800)).await;
        let pause = dice.one_in(3).then(|| dice.millis(0, 20_000));
        match weather {
            EntraWeather::Fair => self.token(3_599),
            EntraWeather::ShortLived => self.token(8),
            EntraWeather::Down => Answer::Refused { status: 503, pause: None },
            EntraWeather::Throttling => Answer::Refused { status: 429, pause },
            EntraWeather::Misconfigured => Answer::Refused { status: 401, pause: None },
            EntraWeather::Hanging => {
                sleep(self.settings.timeout.mul_f64(0.8)).await;
                Answer::Silence
            }
        }
    }

    fn token(&self, life: u64) -> Answer {
        let secret = (self.tokens.fetch_add(1, Relaxed) + 1).to_string();
        Answer::Token { secret, life: Duration::from_secs(life) }
    }

    /// One request on the wire, as the client sees it.
    async fn carry(self: Arc<Self>, mut request: Request) -> reqwest::Result<Response> {
        // Not yet polled a second time: what the breaker says now is what it said to this request.
        let write = request.method() == Method::POST;
        let route = if write { Route::CreateTicket } else { Route::User };
        let probes: fn(&Self) -> &AtomicUsize = if write { |world| &world.probes[1] } else { |world| &world.probes[0] };
        let state = self.client.get().and_then(Weak::upgrade).map(|client| client.breaker_state(route));
        let probe = (state == Some(BreakerState::HalfOpen)).then(|| Counted::new(&self, probes));
        if probe.as_ref().is_some_and(|(_, at_once)| *at_once > 1) {
            self.blame(Invariant::OneProbe, "two probes at once".to_owned());
        }
        if state == Some(BreakerState::Open) {
            self.blame(Invariant::OneProbe, "a request passed the open breaker".to_owned());
        }
        let token = request.headers()[header::AUTHORIZATION].to_str().unwrap()["Bearer ".len()..].parse().unwrap();
        let key = request.headers().get("idempotency-key").map(|key| key.to_str().unwrap().to_owned());
        let call = u64::from_str_radix(&request.headers()[TRACEPARENT].to_str().unwrap()[3..35], 16).unwrap();
        let turn = self.story(call, |story| {
            story.exchanges += 1;
            story.exchanges
        });
        let mut dice = Dice::new(self.seed, call, turn);
        let treatment = match self.poisoned {
            Some(treatment) if call >= POISON => treatment,
            _ => self.treatment(token, &mut dice),
        };
        if treatment == Treatment::Unreachable {
            self.note(call, "refused");
            sleep(dice.millis(1, 100)).await;
            return Err(refused().await);
        }
        sleep(dice.millis(1, 30)).await;
        let body = match request.body_mut().take() {
            Some(body) => body.collect().await.map(|body| body.to_bytes()).unwrap_or_default(),
            None => Bytes::new(),
        };
        let asked = match serde_json::from_slice::<Value>(&body) {
            Ok(ticket) if write => ticket["title"].as_str().unwrap().to_owned(),
            _ => request.url().path_segments().unwrap().next_back().unwrap().to_owned(),
        };
        if asked != resource(call) {
            self.blame(Invariant::OwnAnswer, format!("the trace of {call} asks for {asked}"));
        }
        // From here on the backend is at it, whether the client waits or not.
        let (answered, answer) = oneshot::channel();
        let delay = self.delay(&mut dice);
        let world = Arc::clone(&self);
        tokio::spawn(async move {
            world.arrive(call, write, key.as_deref(), treatment);
            sleep(delay / 2).await;
            if treatment.does_the_work() && write {
                world.story(call, |story| *story.tickets.entry(key.unwrap_or_default()).or_default() += 1);
            }
            sleep(delay / 2).await;
            if matches!(treatment, Treatment::Silence { .. }) {
                sleep(Duration::from_secs(600)).await;
            }
            let _ = answered.send(());
        });
        let _ = answer.await;
        if let Treatment::Status { status: 401 | 429, .. } | Treatment::Stalled { status: 401 | 429, .. } = treatment {
            self.story(call, |story| {
                if let Some(refused) = story.arrivals.last_mut() {
                    *refused = true;
                }
            });
        }
        self.note(call, "answered");
        drop(probe);
        respond(call, write, treatment)
    }

    /// A request has reached the backend.
    fn arrive(&self, call: u64, write: bool, key: Option<&str>, treatment: Treatment) {
        let (earlier, replay, third_token) = self.story(call, |story| {
            let earlier = story.arrivals.clone();
            story.arrivals.push(false);
            story.perhaps_done += u32::from(!treatment.refuses());
            story.keys.extend(key.map(str::to_owned));
            let replay = story.unauthorized > 0;
            let third_token = story.unauthorized > 1;
            let unauthorized =
                matches!(treatment, Treatment::Status { status: 401, .. } | Treatment::Stalled { status: 401, .. });
            story.unauthorized = if unauthorized { story.unauthorized + 1 } else { 0 };
            (earlier, replay, third_token)
        });
        if third_token {
            self.blame(Invariant::Amplification, format!("call {call} was refused twice and asks again"));
        }
        if !earlier.is_empty() {
            if write && !self.settings.idempotent_creates && !earlier.iter().all(|refused| *refused) {
                self.blame(Invariant::SurelyNotHappened, format!("write {call} is sent again: {earlier:?}"));
            }
            if !replay {
                let retries = self.retries.fetch_add(1, Relaxed) + 1;
                let (calls, seconds) = (f64::from(self.calls.load(Relaxed)), self.begun.elapsed().as_secs_f64());
                let share = f64::from(self.settings.retry_percent) / 100.0;
                // The floor is granted for ten seconds in advance, and its window is kept to a tenth.
                let granted = calls * share + f64::from(self.settings.retry_floor) * (seconds / 0.9 + 10.0);
                if f64::from(retries) > granted {
                    self.blame(
                        Invariant::Amplification,
                        format!("{retries} repetitions of {calls} calls in {seconds:.0} s"),
                    );
                }
            }
        }
        if earlier.len() >= 2 * self.settings.max_attempts as usize {
            self.blame(Invariant::Amplification, format!("call {call} asks for the {}th time", earlier.len() + 1));
        }
    }

    fn treatment(&self, token: u32, dice: &mut Dice) -> Treatment {
        let weather = self.weather.lock().unwrap().0;
        let done = dice.percent(40);
        let status = |status, retry_after, done| Treatment::Status { status, retry_after, done };
        if token < self.revoked_below.load(Relaxed) {
            return status(401, None, false);
        }
        let weather = match weather {
            Weather::All => dice.pick(&[
                Weather::Fair,
                Weather::Fair,
                Weather::Lossy,
                Weather::Failing,
                Weather::Throttling,
                Weather::Moody,
                Weather::Stalling,
                Weather::Thin,
                Weather::Odd,
            ]),
            weather => weather,
        };
        let long = dice.percent(10).then(|| dice.0.u64(10..40));
        let wait = dice.percent(50).then(|| dice.0.u64(..4)).or(long);
        match weather {
            Weather::Fair | Weather::Slow | Weather::Crawling | Weather::All => Treatment::Success,
            Weather::Lossy => match dice.0.u8(..10) {
                0 | 1 => Treatment::Unreachable,
                2 | 3 => Treatment::Reset { done },
                4 => Treatment::BrokenBody { done },
                5 => Treatment::Silence { done },
                _ => Treatment::Success,
            },
            Weather::Failing if dice.percent(80) => status(dice.pick(&[500, 502, 503, 503, 504]), wait, done),
            Weather::Throttling if dice.percent(70) => status(429, wait, false),
            Weather::Refusing if !self.steady_token => status(401, None, false),
            Weather::Moody if dice.percent(30) && !self.steady_token => status(401, None, false),
            Weather::Stalling => match dice.0.u8(..4) {
                0 => Treatment::Stalled { status: 200, done: true },
                1 => Treatment::Stalled { status: dice.pick(&[400, 401, 403, 404, 409, 429]), done: false },
                2 => Treatment::Stalled { status: dice.pick(&[408, 500, 502, 503]), done },
                _ => Treatment::Success,
            },
            Weather::Thin => match dice.0.u8(..4) {
                0 => Treatment::Thin(""),
                1 => Treatment::Thin("{}"),
                2 => Treatment::Thin(r#"{"id":null}"#),
                _ => Treatment::Success,
            },
            Weather::Down => Treatment::Unreachable,
            Weather::Hanging => Treatment::Silence { done },
            Weather::Odd => match dice.0.u8(..9) {
                0 => status(302, None, done),
                1 => status(408, None, done),
                2 => status(dice.pick(&[400, 403, 404, 409, 422, 418]), wait, false),
                3 => Treatment::Garbage,
                4 => Treatment::Endless,
                _ => Treatment::Success,
            },
            Weather::Failing | Weather::Throttling | Weather::Refusing | Weather::Moody => Treatment::Success,
        }
    }

    fn delay(&self, dice: &mut Dice) -> Duration {
        match self.weather.lock().unwrap().0 {
            Weather::Slow => dice.millis(100, 2_000),
            Weather::Crawling => dice.millis(1_000, 15_000),
            _ => dice.millis(2, 200),
        }
    }

    /// The weather changes every few seconds; now and then all tokens are revoked.
    async fn change_the_weather(self: Arc<Self>) {
        use EntraWeather as Entra;
        const SKY: [Weather; 18] = [
            Weather::Fair,
            Weather::Fair,
            Weather::Fair,
            Weather::Slow,
            Weather::Crawling,
            Weather::Lossy,
            Weather::Lossy,
            Weather::Failing,
            Weather::Throttling,
            Weather::Refusing,
            Weather::Moody,
            Weather::Down,
            Weather::Hanging,
            Weather::Stalling,
            Weather::Stalling,
            Weather::Thin,
            Weather::Odd,
            Weather::All,
        ];
        const AUTHORITY: [Entra; 9] = [
            Entra::Fair,
            Entra::Fair,
            Entra::Fair,
            Entra::Fair,
            Entra::ShortLived,
            Entra::Down,
            Entra::Throttling,
            Entra::Misconfigured,
            Entra::Hanging,
        ];
        let mut dice = Dice::new(self.seed, WEATHER, 0);
        if self.poisoned.is_some() {
            return;
        }
        if self.lasting {
            *self.weather.lock().unwrap() =
                (dice.pick(&[Weather::Failing, Weather::Throttling, Weather::Lossy]), Entra::Fair);
            return;
        }
        loop {
            let authority = dice.pick(&AUTHORITY);
            let authority = if self.steady_token { Entra::Fair } else { authority };
            *self.weather.lock().unwrap() = (dice.pick(&SKY), authority);
            if dice.one_in(5) && !self.steady_token {
                self.revoke_tokens();
            }
            sleep(dice.millis(1_000, 20_000)).await;
        }
    }

    fn revoke_tokens(&self) {
        self.revoked_below.store(self.tokens.load(Relaxed) + 1, Relaxed);
    }

    /// One call from its begin to its end, held to what a caller may expect. `None` when the server stopped before.
    async fn call(
        self: Arc<Self>,
        client: Arc<BackendClient>,
        number: u64,
        write: bool,
        stop: CancellationToken,
    ) -> Option<Result<(), BackendError>> {
        let trace = format!("00-{number:032x}-{number:016x}-00");
        let trace = Trace { context: TraceContext::parse(&trace).unwrap(), state: None };
        let caller = Ipv4Addr::from_bits(if number < POISON { (number % 5) as u32 } else { u32::MAX });
        let (began, call) = (Instant::now(), client.begin_call_for(trace, None, None, Some(caller.into())));
        self.calls.fetch_add(1, Relaxed);
        let answer = async {
            if write {
                let ticket = NewTicket {
                    title: number.to_string(),
                    description: "A long story.".to_owned(),
                    priority: Priority::Low,
                    assignee_id: None,
                };
                client.create_ticket(&call, &ticket).await.map(|ticket| ticket.id)
            } else {
                client.user(&call, &Segment::try_from(resource(number)).unwrap(), false).await.map(|user| user.id)
            }
        };
        let answer = stop.run_until_cancelled(answer).await;
        if began.elapsed() > self.settings.timeout + TICK {
            self.blame(Invariant::Deadline, format!("call {number} took {:?}", began.elapsed()));
        }
        let Some(answer) = answer else {
            // Its record can tell that the outcome is unknown: the key of whatever was sent is there.
            let key = call.idempotency_key();
            if !self.story(number, |story| story.keys.iter().all(|sent| Some(sent.as_str()) == key)) {
                self.blame(
                    Invariant::Outcome,
                    format!("write {number} was cut off and its record has the key {key:?}"),
                );
            }
            return None;
        };
        self.note(number, if answer.is_ok() { "ok" } else { "failed" });
        match &answer {
            Ok(id) if *id != number.to_string() => {
                self.blame(Invariant::OwnAnswer, format!("call {number} got the answer of {id}"));
            }
            Ok(_) => {}
            Err(error) => {
                let doubtful = error.unknown_write.as_ref();
                let (keys, tickets) = self.story(number, |story| (story.keys.clone(), story.tickets.len()));
                // What is not marked may be sent again by the model; so may what was turned away.
                if write && doubtful.is_none() && self.story(number, |story| story.perhaps_done) > 0 {
                    self.blame(
                        Invariant::NotInvitedTwice,
                        format!("write {number} was sent, and its error is not marked: {error}"),
                    );
                }
                if matches!(error.failure, Failure::CircuitOpen(_)) && self.poisoned.is_some() && number < POISON {
                    self.blame(Invariant::Isolation, format!("call {number} is turned away for what another one asks"));
                }
                if doubtful.is_some_and(|key| !keys.contains(key)) {
                    self.blame(Invariant::FateIsTold, format!("write {number} names a key that was never sent"));
                }
                if doubtful.is_none() && tickets > 0 {
                    self.blame(Invariant::FateIsTold, format!("write {number} is there and counts as failed: {error}"));
                }
                if doubtful.is_none() && write {
                    // Nor may it happen later.
                    self.story(number, |story| story.tickets.insert("none".to_owned(), 0));
                }
            }
        }
        Some(answer.map(drop))
    }

    /// One caller asks for one resource, again and again, twenty times a second or more.
    async fn poison(self: Arc<Self>, client: Arc<BackendClient>) {
        let mut dice = Dice::new(self.seed, CALLERS, 1);
        let mut calls = tokio::task::JoinSet::new();
        for number in POISON.. {
            calls.spawn(Arc::clone(&self).call(Arc::clone(&client), number, false, CancellationToken::new()));
            sleep(dice.millis(10, 50)).await;
        }
    }

    /// Calls for some minutes, and then what must be true again.
    async fn live(self: Arc<Self>) {
        let client = self.client();
        let weather = tokio::spawn(Arc::clone(&self).change_the_weather());
        let mut dice = Dice::new(self.seed, CALLERS, 0);
        let pace = if self.lasting { 150 } else { dice.pick(&[150, 400, 1_000, 2_000]) };
        if self.steady_token {
            sleep(Duration::from_secs(1)).await;
        }
        let mut running = Vec::new();
        let mut number = 0;
        let mut stop = CancellationToken::new();
        let poisoner = self.poisoned.is_some().then(|| tokio::spawn(Arc::clone(&self).poison(Arc::clone(&client))));
        while self.begun.elapsed() < VIRTUAL_TIME {
            number += 1;
            let write = dice.one_in(3);
            if dice.one_in(150) {
                // The server stops, and another one begins where it was.
                std::mem::take(&mut stop).cancel();
            }
            let call = Arc::clone(&self).call(Arc::clone(&client), number, write, stop.clone());
            // A client that leaves takes its read along; a write is finished without it.
            let patience = (!write && dice.one_in(8)).then(|| dice.millis(1, 5_000));
            running.push(tokio::spawn(async move {
                match patience {
                    Some(patience) => drop(tokio::time::timeout(patience, call).await),
                    None => drop(call.await),
                }
            }));
            let lull = dice.one_in(40);
            sleep(if lull { dice.millis(1_000, 8_000) } else { dice.millis(0, pace) }).await;
        }
        weather.abort();
        if let Some(poisoner) = poisoner {
            poisoner.abort();
            let _ = poisoner.await;
        }
        let late = tokio::time::timeout(self.settings.timeout + TICK, futures_util::future::join_all(running)).await;
        match late {
            Err(_) => self.blame(Invariant::NothingStuck, "calls are still running after their deadlines".to_owned()),
            Ok(ends) if ends.iter().any(Result::is_err) => self.blame(Invariant::NoPanic, "a call panicked".to_owned()),
            Ok(_) => {}
        }
        let figures = client.metrics.encode().unwrap();
        if !figures.contains("\nhttp_client_active_requests 0\n") {
            self.blame(Invariant::NothingStuck, "the gauge of requests in flight is not back at 0".to_owned());
        }
        if client.permits.available_permits() != self.settings.max_concurrency {
            self.blame(Invariant::NothingStuck, "a permit is lost".to_owned());
        }

        *self.weather.lock().unwrap() = (Weather::Fair, EntraWeather::Fair);
        sleep(HEALING).await;
        for number in number + 1..number + 12 {
            let call = Arc::clone(&self).call(Arc::clone(&client), number, number % 3 == 0, stop.clone());
            if let Some(Err(error)) = call.await {
                self.blame(Invariant::Healing, format!("call {number} fails although all is well: {error}"));
            }
        }
        // What the backend was still at.
        sleep(Duration::from_secs(700)).await;
        for (call, story) in &*self.stories.lock().unwrap() {
            let surely_none = story.tickets.contains_key("none");
            let tickets = if self.settings.idempotent_creates {
                story.tickets.values().filter(|done| **done > 0).count()
            } else {
                story.tickets.values().map(|done| *done as usize).sum()
            };
            if tickets > 1 || story.keys.len() > 1 {
                self.blame(
                    Invariant::OneTicket,
                    format!("call {call} made {:?} under {:?}", story.tickets, story.keys),
                );
            }
            if surely_none && tickets > 0 {
                self.blame(Invariant::FateIsTold, format!("write {call} happened after it had surely failed"));
            }
        }
    }
}

fn respond(call: u64, write: bool, treatment: Treatment) -> reqwest::Result<Response> {
    let good = || {
        let id = call.to_string();
        let text = json!({
            "id": id, "name": "", "email": "", "created_at": "", "title": "", "description": "", "priority": "low",
            "status": "open", "updated_at": "",
        });
        reqwest::Body::from(text.to_string())
    };
    let (status, body) = match treatment {
        Treatment::Unreachable | Treatment::Reset { .. } | Treatment::Silence { .. } => return Err(reset()),
        Treatment::Stalled { status, .. } => (status, reqwest::Body::wrap(StalledBody)),
        Treatment::Thin(body) => (if write { 201 } else { 200 }, reqwest::Body::from(body)),
        Treatment::BrokenBody { .. } => (200, reqwest::Body::wrap(BrokenBody(false))),
        Treatment::Status { status, .. } => (status, reqwest::Body::from("no good")),
        Treatment::Garbage => (200, reqwest::Body::from("{\"id\":")),
        Treatment::Endless => (200, reqwest::Body::from(vec![b' '; RESPONSE_LIMIT + 1])),
        Treatment::Success => (if write { 201 } else { 200 }, good()),
    };
    let mut response = http::Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if let Treatment::Status { retry_after: Some(seconds), .. } = treatment {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    Ok(response.into())
}

/// A body of which nothing comes.
struct StalledBody;

impl Body for StalledBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Pending
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(100)
    }
}

/// A body that breaks off after its first bytes.
struct BrokenBody(bool);

impl Body for BrokenBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let begun = std::mem::replace(&mut self.0, true);
        let part = if begun {
            Err(std::io::ErrorKind::ConnectionReset.into())
        } else {
            Ok(Frame::data(Bytes::from_static(b"{\"id\"")))
        };
        Poll::Ready(Some(part))
    }
}

struct Run {
    blame: Vec<(Invariant, String)>,
    history: Vec<(u128, u64, &'static str)>,
}

fn run(seed: u64, steady_token: bool) -> Run {
    run_in(seed, || World::new(seed, steady_token))
}

fn run_in(seed: u64, make: impl FnOnce() -> Arc<World>) -> Run {
    // The jitter of our own code is drawn from the thread's generator.
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let world = runtime.block_on(async { make() });
    let life = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(Arc::clone(&world).live())));
    if life.is_err() {
        world.blame.lock().unwrap().push((Invariant::NoPanic, format!("seed {seed}: panicked")));
    }
    drop(runtime);
    let blame = std::mem::take(&mut *world.blame.lock().unwrap());
    let history = std::mem::take(&mut *world.history.lock().unwrap());
    Run { blame, history }
}

/// All seeds, run once for all the tests.
#[expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test has no settings, and is shown what it prints"
)]
fn all() -> &'static [(Invariant, String)] {
    static ALL: LazyLock<Vec<(Invariant, String)>> = LazyLock::new(|| {
        let seeds: Vec<u64> = match std::env::var("SIMULATION_SEED").ok().and_then(|seed| seed.parse().ok()) {
            Some(seed) => vec![seed; 100],
            None => (0..SEEDS).collect(),
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let (started, events) = (std::time::Instant::now(), AtomicUsize::new(0));
        let blame = std::thread::scope(|scope| {
            let work = |seeds: &[u64]| {
                let mut blame = Vec::new();
                for seed in seeds {
                    let run = run(*seed, false);
                    events.fetch_add(run.history.len(), Relaxed);
                    blame.extend(run.blame);
                }
                blame
            };
            let shares = seeds.chunks(seeds.len().div_ceil(workers));
            let threads: Vec<_> = shares.map(|share| scope.spawn(move || work(share))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let (seeds, took) = (seeds.len(), started.elapsed().as_secs_f64());
        println!("{seeds} runs of {VIRTUAL_TIME:?} each, {} events, in {took:.1} s", events.into_inner());
        blame
    });
    &ALL
}

#[track_caller]
fn holds(invariant: Invariant) {
    let broken: Vec<_> =
        all().iter().filter(|(broken, _)| *broken == invariant).map(|(_, what)| what.as_str()).collect();
    assert!(broken.is_empty(), "{} times, first:\n{}", broken.len(), broken[..broken.len().min(10)].join("\n"));
}

#[test]
fn one_call_makes_at_most_one_ticket_under_one_key() {
    holds(Invariant::OneTicket);
}

#[test]
fn a_write_is_sent_again_only_when_it_surely_did_not_happen() {
    holds(Invariant::SurelyNotHappened);
}

#[test]
fn a_write_that_may_have_happened_never_counts_as_plainly_failed() {
    holds(Invariant::FateIsTold);
}

#[test]
fn repetitions_stay_within_the_share_of_calls_and_the_floor() {
    holds(Invariant::Amplification);
}

#[test]
fn no_call_outlives_its_deadline_by_more_than_a_tick() {
    holds(Invariant::Deadline);
}

#[test]
fn never_more_than_one_exchange_with_entra_is_in_flight() {
    holds(Invariant::OneExchangeWithEntra);
}

#[test]
fn the_breaker_lets_nothing_through_but_one_probe_at_a_time() {
    holds(Invariant::OneProbe);
}

#[test]
fn nothing_is_stuck_and_the_gauge_of_requests_in_flight_returns_to_zero() {
    holds(Invariant::NothingStuck);
}

#[test]
fn after_healing_every_call_succeeds_within_the_cool_downs() {
    holds(Invariant::Healing);
}

#[test]
fn every_caller_gets_the_answer_to_its_own_question() {
    holds(Invariant::OwnAnswer);
}

#[test]
fn nothing_panics() {
    holds(Invariant::NoPanic);
}

#[test]
fn no_write_is_invited_again_that_may_have_been_sent() {
    holds(Invariant::NotInvitedTwice);
}

#[test]
fn a_write_that_was_cut_off_has_what_tells_its_outcome() {
    holds(Invariant::Outcome);
}

/// The backend is well for everybody else, who may still leave, or be many.
#[test]
fn one_bad_resource_of_one_caller_turns_nobody_else_away() {
    let kinds = [
        Treatment::Status { status: 500, retry_after: None, done: false },
        Treatment::Status { status: 503, retry_after: None, done: false },
        Treatment::Reset { done: false },
        Treatment::Silence { done: false },
        Treatment::Stalled { status: 200, done: true },
    ];
    for seed in 0..50 {
        let kind = kinds[seed as usize % kinds.len()];
        let run = run_in(seed, || World::poisoned(seed, kind));
        let broken: Vec<_> = run.blame.iter().filter(|(invariant, _)| *invariant == Invariant::Isolation).collect();
        assert!(broken.is_empty(), "{kind:?}: {} times, first {:?}", broken.len(), broken[0]);
        let others = run.history.iter().filter(|(_, call, what)| *call < POISON && *what == "ok").count();
        assert!(others > 50, "{kind:?}: hardly anybody else called");
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..10 {
        let (first, second) = (run(seed, true), run(seed, true));
        assert!(first.history.len() > 50, "seed {seed}: hardly anything happened");
        let differs = first.history.iter().zip(&second.history).find(|(first, second)| first != second);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.history.len(), second.history.len(), "seed {seed}");
    }
}
