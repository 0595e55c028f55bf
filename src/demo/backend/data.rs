//! What the stand-in backend knows at its start: people, tickets and rows that look real and are the same every time.

use std::time::{Duration, SystemTime};

use fastrand::Rng;
use serde_json::{Map, Value, json};

use super::super::wire::rfc3339;

/// How many users there are; their ids are `1` to `250`.
pub(super) const USERS: usize = 250;
/// How many tickets there are at the start.
pub(super) const TICKETS: usize = 120;

/// 2026-11-02T08:00:00Z: the moment at which all seeded data was looked at.
const NOW: u64 = 1_793_606_400;
const DAY: u64 = 86_400;

/// A named table of rows; all rows have the same columns.
pub(super) struct Dataset {
    pub(super) name: &'static str,
    pub(super) rows: Vec<Map<String, Value>>,
}

fn pick<'a>(rng: &mut Rng, list: &[&'a str]) -> &'a str {
    list.get(rng.usize(..list.len())).copied().unwrap_or_default()
}

fn moment(seconds: u64) -> String {
    rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

fn day(seconds: u64) -> String {
    moment(seconds).chars().take(10).collect()
}

/// The money amount of a double, to the cent.
fn cents(amount: f64) -> f64 {
    (amount * 100.0).round() / 100.0
}

/// The map in a `json!` object.
pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

const FIRST_NAMES: [&str; 24] = [
    "Amina",
    "Jonas",
    "Mei",
    "Oluwaseun",
    "Sofía",
    "Pieter",
    "Yuki",
    "Anaïs",
    "Dmitri",
    "Priya",
    "Tomás",
    "Ingrid",
    "Kwame",
    "Leila",
    "Marek",
    "Nora",
    "Rafael",
    "Siobhán",
    "Thandi",
    "Viktor",
    "Wanjiru",
    "Zoë",
    "Emre",
    "Hana",
];
const LAST_NAMES: [&str; 22] = [
    "Okafor",
    "Lindqvist",
    "Chen",
    "Adeyemi",
    "García",
    "de Vries",
    "Tanaka",
    "Lefèvre",
    "Volkov",
    "Raman",
    "Silva",
    "Berg",
    "Mensah",
    "Haddad",
    "Nowak",
    "Fischer",
    "Costa",
    "O'Brien",
    "Dlamini",
    "Petrov",
    "Kimani",
    "Yılmaz",
];
const DEPARTMENTS: [&str; 7] = ["Engineering", "Finance", "Support", "Sales", "Operations", "Legal", "People"];
const OFFICES: [&str; 6] = ["Utrecht", "Lisbon", "Singapore", "Toronto", "Nairobi", "Kraków"];

/// The users, by rising id, each with its `details`.
pub(super) fn users() -> Vec<Map<String, Value>> {
    let mut rng = Rng::with_seed(1);
    (1..=USERS).map(|id| object(user(id, &mut rng))).collect()
}

fn user(id: usize, rng: &mut Rng) -> Value {
    let (first, last) = (pick(rng, &FIRST_NAMES), pick(rng, &LAST_NAMES));
    let ascii = |name: &str| name.to_lowercase().chars().filter_map(plain_letter).collect::<String>();
    let created = NOW - rng.u64(30..2000) * DAY - rng.u64(..DAY);
    let manager = if id == 1 { Value::Null } else { json!(rng.usize(1..id).to_string()) };
    json!({
        "id": id.to_string(),
        "name": format!("{first} {last}"),
        "email": format!("{}.{}{id}@contoso.example", ascii(first), ascii(last)),
        "created_at": moment(created),
        "active": rng.u8(..20) > 0,
        "details": {
            "department": pick(rng, &DEPARTMENTS),
            "office": pick(rng, &OFFICES),
            "manager_id": manager,
            "phone": format!("+31 30 555 {:04}", rng.u16(..10_000)),
            "languages": [pick(rng, &["en", "nl", "pt"]), pick(rng, &["de", "fr", "sw", "pl"])],
            "last_login_at": moment(NOW - rng.u64(..14 * DAY)),
        },
    })
}

/// The letter that an e-mail address has in place of this one.
fn plain_letter(letter: char) -> Option<char> {
    match letter {
        'a'..='z' => Some(letter),
        'á' => Some('a'),
        'è' | 'ë' => Some('e'),
        'í' | 'ï' | 'ı' => Some('i'),
        'ó' => Some('o'),
        _ => None,
    }
}

/// The tickets, newest first.
pub(super) fn tickets() -> Vec<Map<String, Value>> {
    let mut rng = Rng::with_seed(2);
    (0..TICKETS).map(|age| ticket(age, &mut rng)).collect()
}

fn ticket(age: usize, rng: &mut Rng) -> Map<String, Value> {
    let (subject, story) = [
        (
            "VPN drops after a few minutes",
            "The connection ends about five minutes after sign-in and has to be made again by hand.",
        ),
        (
            "Cannot open the monthly report",
            "Opening the report shows a blank page; the browser console says that a script was blocked.",
        ),
        ("Invoice export is missing rows", "The exported file ends at row 500 although the list on screen shows more."),
        ("Laptop fan runs all the time", "Even with no program open the fan is loud; a restart did not change it."),
        (
            "New colleague needs access",
            "Please grant the usual team roles before Monday, so that the first day is not lost.",
        ),
        ("Search returns yesterday's data", "Items created this morning cannot be found; they appear the next day."),
        (
            "Password reset mail never arrives",
            "Three attempts since nine o'clock, nothing in the inbox and nothing in the spam folder.",
        ),
        ("Printer on floor 2 jams", "Every second page gets stuck in the tray on the left side."),
    ]
    .get(rng.usize(..8))
    .copied()
    .unwrap_or_default();
    let created = NOW - age as u64 * 17_000 - rng.u64(..9_000);
    let status = match (age, rng.u8(..10)) {
        (..40, 0..6) => "open",
        (..80, 3..9) => "in_progress",
        _ => "closed",
    };
    let updated = if status == "open" { created } else { (created + rng.u64(600..3 * DAY)).min(NOW) };
    let assignee = (status != "open" || rng.bool()).then(|| rng.usize(1..=USERS).to_string());
    let mut ticket = object(json!({
        "id": format!("T-{}", 1000 + TICKETS - age),
        "title": format!("{subject} ({})", pick(rng, &OFFICES)),
        "description": story,
        "priority": pick(rng, &["low", "medium", "medium", "high", "critical"]),
        "status": status,
        "created_at": moment(created),
        "updated_at": moment(updated),
        "channel": pick(rng, &["mail", "chat", "phone"]),
    }));
    ticket.extend(assignee.map(|id| ("assignee_id".to_owned(), json!(id))));
    ticket
}

/// The datasets.
pub(super) fn datasets() -> Vec<Dataset> {
    let mut rng = Rng::with_seed(3);
    let mut dataset = |name, rows, row: fn(usize, &mut Rng) -> Value| Dataset {
        name,
        rows: (1..=rows).map(|n| object(row(n, &mut rng))).collect(),
    };
    vec![dataset("sales", 1800, sale), dataset("incidents", 700, incident), dataset("inventory", 900, stock)]
}

fn sale(n: usize, rng: &mut Rng) -> Value {
    let (quantity, price) = (rng.u32(1..40), cents(rng.f64() * 400.0 + 5.0));
    json!({
        "order_id": format!("SO-{}", 40_000 + n),
        "sold_on": day(NOW - rng.u64(..365) * DAY),
        "region": pick(rng, &["EMEA", "APAC", "AMER"]),
        "product": pick(rng, &["Sensor A", "Sensor B", "Gateway", "Licence", "Support plan"]),
        "quantity": quantity,
        "unit_price": price,
        "total": cents(f64::from(quantity) * price),
        "returned": rng.u8(..25) == 0,
    })
}

fn incident(n: usize, rng: &mut Rng) -> Value {
    let opened = NOW - rng.u64(3600..300 * DAY);
    let minutes = rng.u64(5..2000);
    let resolved = opened + minutes * 60 < NOW && rng.u8(..12) > 0;
    json!({
        "incident_id": n,
        "opened_at": moment(opened),
        "service": pick(rng, &["checkout", "identity", "search", "billing", "mail-relay"]),
        "severity": rng.u8(1..=4),
        "resolved": resolved,
        "minutes_to_resolve": if resolved { json!(minutes) } else { Value::Null },
        "customers_affected": rng.u32(..5000),
    })
}

fn stock(n: usize, rng: &mut Rng) -> Value {
    let on_hand = rng.u32(..600);
    let thing = pick(rng, &["Cable", "Bracket", "Antenna", "Battery", "Housing"]);
    json!({
        "sku": format!("SKU-{n:05}"),
        "name": format!("{thing} {}", pick(rng, &["S", "M", "L"])),
        "warehouse": pick(rng, &["UTR-1", "LIS-2", "SIN-1", "TOR-1"]),
        "on_hand": on_hand,
        "reserved": rng.u32(..=on_hand),
        "unit_cost": cents(rng.f64() * 60.0 + 0.5),
        "discontinued": rng.u8(..15) == 0,
    })
}
