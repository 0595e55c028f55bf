//! The integration tests: one binary, one way in ([`support::TestApp`]), everything through real HTTP.

#![allow(unreachable_pub, reason = "in a test binary `pub` says the same as `pub(crate)`, and reads better")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, in its helpers too"
)]

mod support;

mod admission;
mod architecture;
mod audit;
mod authorization;
mod browsers;
mod cancellation;
mod check;
mod cli;
mod connections;
mod errors;
mod fairness;
mod forwarding;
mod hostile;
mod identity;
mod lifecycle;
mod logs;
mod matrix;
mod memory;
mod messages;
mod metrics;
mod on_behalf_of;
mod operations;
mod overload;
mod protocol;
mod reading;
mod retryable;
mod settings;
mod smoke;
mod spans;
mod tools;
mod tools_paths;
mod trace;
