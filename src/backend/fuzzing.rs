//! Ways in for fuzz targets: an answer of the backend, below everything that reads it.

use super::*;

/// Reads an answer as the call that got it would; whether it was a success.
pub(crate) async fn read_answer(client: &BackendClient, what: u8, response: Response) -> Result<(), BackendError> {
    let call = client.begin_call(Trace::begin());
    let request = match what % 5 {
        4 => Outgoing::write(Route::CreateTicket, client.url(&["tickets"]), Bytes::from_static(b"{}")),
        _ => Outgoing::read(Route::Users, client.url(&["users"])),
    };
    if let Some(write) = &request.write {
        write.sent.store(true, Relaxed);
    }
    let body = client.answer(&call, &request, response).await?;
    match what % 5 {
        0 => client.decode::<record::Object<User>>(&request, &body).map(drop),
        1 => client.decode::<UserPage>(&request, &body).map(drop),
        2 => client.decode::<TicketPage>(&request, &body).map(drop),
        3 => client.rows(&request, &body, 100).map(drop),
        _ => client.decode::<record::Object<Ticket>>(&request, &body).map(drop),
    }
}

/// The wait that a header asks for.
pub(crate) fn wait(headers: &HeaderMap) -> Option<Duration> {
    retry::retry_after(headers, SystemTime::now())
}
