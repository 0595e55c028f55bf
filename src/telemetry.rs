//! Which logs, traces and metrics exist. A leaf: every room may use it, it uses none of ours but the settings' types.

pub mod audit;
mod lines;
pub mod logs;
pub mod metrics;
pub mod spans;
mod text;
pub mod trace;
