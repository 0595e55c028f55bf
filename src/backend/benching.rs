//! Ways in for micro-benchmarks: addresses, answers and failures of the backend, without a backend.

use super::*;

/// The address of a user, as a call builds it.
pub(crate) fn user_url(client: &BackendClient, id: &str) -> Url {
    let mut url = client.url(&["users", id]);
    url.set_query(Some("include_details=true"));
    url
}

/// Reads the body of a user's answer.
pub(crate) fn user(client: &BackendClient, body: &[u8]) -> Result<User, BackendError> {
    let user: record::Object<User> = client.decode(&Outgoing::read(Route::User, client.base_url.clone()), body)?;
    Ok(user.0)
}

/// Reads the body of a query's answer.
pub(crate) fn rows(client: &BackendClient, body: &Bytes) -> Result<QueryRows, BackendError> {
    client.rows(&Outgoing::read(Route::Query, client.base_url.clone()), body, 1_000)
}

/// What comes of a 404.
pub(crate) fn not_found(client: &BackendClient) -> BackendError {
    let failure = Failure::Status { status: StatusCode::NOT_FOUND, retry_after: None };
    client.fail(&Outgoing::read(Route::User, user_url(client, "42")), failure)
}
