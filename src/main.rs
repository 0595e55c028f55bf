//! How the process starts and ends: a command in, an exit code out.

#![expect(clippy::print_stderr, reason = "a command complains on stderr")]

use std::future::pending;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mcp_server::app::App;
use mcp_server::check::{self, Verdict};
use mcp_server::settings::{self, Environment, Settings, SettingsError};
use mcp_server::telemetry::audit;
use mcp_server::telemetry::logs::{self, LevelSwitch};
use mcp_server::web::healthcheck;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Much faster than glibc's allocator under many small allocations on several threads; see docs/performance.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `EX_USAGE` and `EX_CONFIG` of sysexits.h.
const BAD_USAGE: u8 = 64;
const BAD_SETTINGS: u8 = 78;
/// "File size limit exceeded", on all systems that we run on.
const SIGXFSZ: i32 = 25;

#[derive(Parser)]
#[command(
    name = "mcp-server",
    version,
    about = "A Model Context Protocol server in front of a REST backend, configured by the environment"
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve MCP over streamable HTTP (what happens without a command, too)
    Serve,
    /// Serve on this machine against a stand-in Entra ID and a stand-in backend: no Azure account needed
    #[cfg(feature = "demo")]
    Demo(mcp_server::app::demo::Options),
    /// Walk the whole chain once, from the settings to the backend, and say what is wrong and what mends it
    Check {
        /// Answer with one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Look at audit files
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Ask the server that runs on this machine whether it is well: exit code 0 or 1
    Healthcheck {
        /// Which of its health routes to ask
        #[arg(value_enum, default_value_t = healthcheck::Probe::Ready)]
        probe: healthcheck::Probe,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Follow the chain of hashes in an audit file, and name the first link that is broken: exit code 0 or 1
    Verify {
        /// The file that AUDIT_LOG_FILE named; its head, FILE.head, lies beside it
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // `--help` and `--version` come here too, and are no mistakes.
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(BAD_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let result = match arguments.command.unwrap_or(Command::Serve) {
        Command::Serve => {
            Settings::from_env().map_err(bad_settings).and_then(|settings| run(&settings, serve(&settings)))
        }
        #[cfg(feature = "demo")]
        Command::Demo(options) => demo(&options),
        Command::Check { json } => walk(json),
        Command::Audit { command: AuditCommand::Verify { file } } => verify(&file),
        Command::Healthcheck { probe } => {
            settings::healthcheck_address(&Environment::load()).map_err(bad_settings).and_then(|address| {
                healthcheck::ask(address, probe).map_err(|error| {
                    eprintln!("mcp-server at {address} is not well: {error}");
                    ExitCode::FAILURE
                })
            })
        }
    };
    result.err().unwrap_or(ExitCode::SUCCESS)
}

fn bad_settings(error: SettingsError) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(BAD_SETTINGS)
}

/// Installs the logs, runs to the end, and flushes them.
fn run(settings: &Settings, work: impl Future<Output = anyhow::Result<()>>) -> Result<(), ExitCode> {
    let logs = logs::install(&settings.log).map_err(|error| {
        eprintln!("mcp-server cannot write logs: {error:#}");
        ExitCode::FAILURE
    })?;
    let ended = start_runtime().and_then(|runtime| {
        runtime.block_on(async {
            tokio::select! {
                ended = work => ended,
                error = switch_level(logs.level()) => error,
            }
        })
    });
    ended.map_err(|error| {
        tracing::error!("mcp-server ends with an error: {error:#}");
        ExitCode::FAILURE
    })
}

fn start_runtime() -> anyhow::Result<Runtime> {
    // As many workers as the cgroup's CPU quota allows. A single one needs no queue that others could steal from, and which has room for
    // 256 tasks: without it, all take turns, however many connections there are.
    let mut runtime = match std::thread::available_parallelism() {
        Ok(cpus) if cpus.get() == 1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    Ok(runtime.enable_all().build()?)
}

/// SIGUSR1 takes the log to DEBUG, and back.
async fn switch_level(level: LevelSwitch) -> anyhow::Result<()> {
    let mut signals = signal(SignalKind::user_defined1())?;
    while signals.recv().await.is_some() {
        level.toggle();
    }
    pending().await
}

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    // A write beyond the limit for the size of files fails then, and does not end the process.
    let _caught = signal(SignalKind::from_raw(SIGXFSZ))?;
    let mut signals = Signals::listen()?;
    let app = App::bind(settings)?;
    serve_until_told(app, &mut signals).await
}

/// Serves until the first signal, in good order; a second signal ends it at once.
async fn serve_until_told(app: App, signals: &mut Signals) -> anyhow::Result<()> {
    let (first, second) = (tokio_util::sync::CancellationToken::new(), tokio_util::sync::CancellationToken::new());
    let serving = app.serve(first.clone().cancelled_owned());
    let watching = async {
        signals.next().await;
        first.cancel();
        signals.next().await;
        second.cancel();
        pending::<()>().await;
    };
    tokio::select! {
        ended = serving => Ok(ended?),
        () = second.cancelled() => anyhow::bail!("told to stop twice: ending at once"),
        () = watching => Ok(()),
    }
}

/// `mcp-server check`. No logs are installed: its answer is all that it prints.
fn walk(json: bool) -> Result<(), ExitCode> {
    let fail = |error: anyhow::Error| {
        eprintln!("mcp-server check cannot answer: {error:#}");
        ExitCode::FAILURE
    };
    let runtime = start_runtime().map_err(fail)?;
    let verdict = runtime.block_on(check::run(&Environment::load(), json, &mut std::io::stdout().lock()));
    // A resolver or a file system that hangs must not keep us.
    runtime.shutdown_background();
    match verdict.map_err(|error| fail(error.into()))? {
        Verdict::Well => Ok(()),
        Verdict::Failed => Err(ExitCode::FAILURE),
        Verdict::BadSettings => Err(ExitCode::from(BAD_SETTINGS)),
    }
}

/// `mcp-server audit verify`.
#[expect(clippy::print_stdout, reason = "the answer of a command goes to stdout")]
fn verify(file: &Path) -> Result<(), ExitCode> {
    match audit::verify(file) {
        Ok(whole) => {
            println!(
                "{}: whole, {} records, {} events lost and told of, {} lines torn by crashes and sealed; the last hash is {}",
                file.display(),
                whole.records,
                whole.lost_events,
                whole.torn_lines,
                whole.last_hash
            );
            for incident in whole.incidents {
                println!("{}: line {}: {}", file.display(), incident.line, incident.what);
            }
            Ok(())
        }
        Err(broken) => {
            println!("{}: BROKEN, {broken}", file.display());
            Err(ExitCode::FAILURE)
        }
    }
}

#[cfg(feature = "demo")]
fn demo(options: &mcp_server::app::demo::Options) -> Result<(), ExitCode> {
    use mcp_server::app::demo::Demo;

    let vars = Environment::load();
    if settings::in_kubernetes(&vars) {
        eprintln!(
            "mcp-server demo issues its own tokens and is for one person's machine: it does not run in Kubernetes"
        );
        return Err(ExitCode::from(BAD_USAGE));
    }
    let fail = |error: anyhow::Error| {
        eprintln!("mcp-server demo ends with an error: {error:#}");
        ExitCode::FAILURE
    };
    let runtime = start_runtime().map_err(fail)?;
    let stand_ins = runtime.block_on(Demo::start(options)).map_err(fail)?;
    let settings = stand_ins.settings(&vars).map_err(bad_settings)?;
    let logs = logs::install(&settings.log).map_err(fail)?;
    runtime
        .block_on(async {
            let mut signals = Signals::listen()?;
            let app = App::bind(&settings)?;
            let introduction = stand_ins.introduce(app.address(), app.metrics_address());
            tokio::select! {
                ended = serve_until_told(app, &mut signals) => ended,
                error = introduction => Err(error),
                error = switch_level(logs.level()) => error,
            }
        })
        .map_err(fail)
}

/// SIGTERM, as Kubernetes sends it, SIGINT, as a terminal does, and SIGHUP, as a terminal that is closed does.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` under `nohup`, which asks us to ignore it.
    hangup: Option<Signal>,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())?, hangup })
    }

    async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Whether whoever started the process has set SIGHUP to be ignored. Where there is no `/proc`, nobody has.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // SIGHUP is signal 1, and has the lowest bit.
    ignored.is_some_and(|mask| mask & 1 == 1)
}
