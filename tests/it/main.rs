//! The integration tests: one binary, one way in ([`support::TestApp`]), everything through real HTTP.

#![expect(missing_docs, reason = "the names of the tests are their documentation")]

mod support;

mod smoke;
