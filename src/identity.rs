//! Who we are in Entra's eyes: the one place that obtains the token for the backend.
//!
//! `chain` performs one exchange with `azure_identity`, over our own `transport`. `source` decides when that happens
//! and hands out what came of it; `on_behalf_of` gets tokens for the users who call; `fault` says what went wrong, and in whose hands the remedy is; `inspect` goes the same
//! way once, to be looked at. The SDK's own cache and its retries stay unused: they can neither refresh ahead, nor outlive an
//! outage, nor share a failure.

#[cfg(feature = "benches")]
pub(crate) mod benching;
mod chain;
mod fault;
mod inspect;
mod on_behalf_of;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod simulated;
mod source;
mod transport;

pub use chain::IdentityStartError;
pub use fault::{Advice, FaultClass, IdentityError, advice};
pub use inspect::{Claims, Inspection, resolves};
pub use on_behalf_of::{OnBehalfOf, UserAssertion};
pub use source::{BearerToken, TokenSource, TokenStats};
pub use transport::{Greeting, classify};
