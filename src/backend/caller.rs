//! For whom a call is made, as far as the backend is concerned: whose token it carries, and what it is told of the caller.
//!
//! Everything here comes out of a token that was checked; nothing comes out of a header that a caller wrote.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use secrecy::SecretString;

use crate::identity::UserAssertion;

const SUBJECT: HeaderName = HeaderName::from_static("x-caller-subject");
const APP: HeaderName = HeaderName::from_static("x-caller-app");
const TENANT: HeaderName = HeaderName::from_static("x-caller-tenant");

/// Who calls a tool, as a checked token has it.
#[derive(Debug, Clone, Copy)]
pub struct Principal<'a> {
    /// `tid`: the tenant.
    pub tenant: &'a str,
    /// `oid`: the user, or the service principal of an app that calls by itself.
    pub object: &'a str,
    /// `azp` or `appid`: the client.
    pub app: &'a str,
    /// Whether a user stands behind the call.
    pub delegated: bool,
    /// The token itself, where it may be exchanged.
    pub assertion: Option<&'a SecretString>,
}

/// Whose token a call carries.
#[derive(Debug)]
pub(super) enum Bearer {
    /// The server's own.
    Server,
    /// One for this user.
    User(Arc<UserAssertion>),
    /// Nobody's: the call may not be made.
    Nobody,
}

impl Bearer {
    /// The user's, or for an app without one the server's, where that may be.
    pub(super) fn on_behalf_of(principal: Option<Principal<'_>>, app_fallback: bool) -> Self {
        match principal {
            Some(Principal { tenant, object, delegated: true, assertion: Some(token), .. }) => {
                Self::User(Arc::new(UserAssertion::new(tenant, object, token.clone())))
            }
            Some(Principal { delegated: false, .. }) if app_fallback => Self::Server,
            _ => Self::Nobody,
        }
    }
}

/// What the backend is told of the caller, as finished headers.
#[derive(Debug)]
pub(super) struct Told([(HeaderName, HeaderValue); 3]);

impl Told {
    /// `None` when a header cannot carry it, which no id of Entra's is.
    pub(super) fn of(principal: Principal<'_>) -> Option<Self> {
        let value = |text: &str| HeaderValue::from_str(text).ok().filter(|value| !value.is_empty());
        let Principal { tenant, object, app, .. } = principal;
        Some(Self([(SUBJECT, value(object)?), (APP, value(app)?), (TENANT, value(tenant)?)]))
    }

    pub(super) fn write_to(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.0 {
            headers.insert(name.clone(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_carries_the_users_token_or_none_unless_apps_may_fall_back() {
        let token = SecretString::from("a.b.c");
        let user = Principal { tenant: "t", object: "o", app: "a", delegated: true, assertion: Some(&token) };
        for (principal, app_fallback, expected) in [
            (Some(user), false, "User"),
            (Some(user), true, "User"),
            (Some(Principal { delegated: false, ..user }), false, "Nobody"),
            (Some(Principal { delegated: false, ..user }), true, "Server"),
            (Some(Principal { assertion: None, ..user }), true, "Nobody"), // never the server's for a user
            (None, true, "Nobody"),
        ] {
            let bearer = Bearer::on_behalf_of(principal, app_fallback);
            assert!(format!("{bearer:?}").starts_with(expected), "{bearer:?} for {principal:?}, {app_fallback}");
            assert!(!format!("{bearer:?}{principal:?}").contains("a.b.c"));
        }
    }

    #[test]
    fn what_fits_no_header_is_not_told_by_halves() {
        let caller = Principal { tenant: "t", object: "o", app: "a", delegated: false, assertion: None };
        let mut headers = HeaderMap::new();
        Told::of(caller).unwrap().write_to(&mut headers);
        assert_eq!(
            (&headers[SUBJECT], &headers[APP], &headers[TENANT]),
            (&"o".parse().unwrap(), &"a".parse().unwrap(), &"t".parse().unwrap())
        );
        assert!(Told::of(Principal { object: "o\r\nx: y", ..caller }).is_none());
        assert!(Told::of(Principal { app: "", ..caller }).is_none());
    }
}
