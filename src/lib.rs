//! A Model Context Protocol server that platform teams put in front of an internal REST service.
//!
//! One call takes one way: [`web`] → [`tools`] → [`backend`] → [`identity`]. [`app`] connects the rooms,
//! [`settings`] alone reads the environment, and `ARCHITECTURE.md` is the map.

pub mod app;
pub mod auth;
pub mod backend;
#[cfg(feature = "benches")]
#[doc(hidden)]
pub mod benching;
pub mod check;
#[cfg(feature = "demo")]
pub mod demo;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod json;
pub mod memory;
pub mod problem;
pub mod settings;
pub mod telemetry;
pub mod tools;
pub mod visible;
pub mod web;
