//! Ways in for fuzz targets: the arguments of a tool, and what is told of a failure.

use super::*;
use crate::backend::BackendError;

/// Checks and decodes arguments for a tool; the tools are counted in the order of their names.
pub(crate) fn decode(tool: u8, arguments: JsonObject) -> Result<(), Problem> {
    fn decode<T: Tool>(arguments: JsonObject) -> Result<(), Problem> {
        find(T::NAME).map_or(Ok(()), |entry| args::decode::<T>(&entry.rules, arguments).map(drop))
    }
    match tool % 5 {
        0 => decode::<tickets::CreateTicket>(arguments),
        1 => decode::<users::GetUserProfile>(arguments),
        2 => decode::<tickets::ListTickets>(arguments),
        3 => decode::<users::ListUsers>(arguments),
        _ => decode::<data::QueryData>(arguments),
    }
}

/// What a caller is told of a failure.
pub(crate) fn advice(error: &BackendError) -> Problem {
    error::advice(error, || "user `42`".to_owned())
}
