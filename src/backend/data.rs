//! Rows of the backend's datasets, which may be many: they are checked and written anew in one pass, and never become a tree.

mod rows;

use bytes::Bytes;
use url::form_urlencoded;

use super::{BackendClient, BackendError, Call, Outgoing, Route, Segment};

/// What `GET /query/{dataset}` is asked.
#[derive(Debug, Clone)]
pub struct Query {
    /// Which dataset.
    pub dataset: Segment,
    /// What the rows must match, as compact JSON; the backend says what filters mean.
    pub filters: Option<String>,
    /// How many rows at most.
    pub limit: u32,
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryRows {
    /// How many rows there are, no more than were asked for.
    pub count: usize,
    /// Whether the backend sent more.
    pub truncated: bool,
    /// The rows, with all their columns: a JSON array of objects, compact.
    pub json: String,
}

impl BackendClient {
    /// `GET /query/{dataset}?limit[&filters]`, the filters as compact JSON.
    ///
    /// # Errors
    ///
    /// [`BackendError`], as every method here.
    pub async fn query(&self, call: &Call, query: &Query) -> Result<QueryRows, BackendError> {
        let mut url = self.url(&["query", query.dataset.as_str()]);
        url.set_query(Some(&format!("limit={}", query.limit)));
        if let Some(filters) = &query.filters {
            // As a form would be, but with `%20` for a space: every decoder reads that, and not every one reads `+`.
            let filters = form_urlencoded::byte_serialize(filters.as_bytes()).collect::<String>().replace('+', "%20");
            url.set_query(Some(&format!("limit={}&filters={filters}", query.limit)));
        }
        let request = Outgoing::read(Route::Query, url);
        let body = self.whole_answer(call, &request).await?;
        self.rows(&request, &body, query.limit)
    }

    pub(super) fn rows(&self, request: &Outgoing, body: &Bytes, limit: u32) -> Result<QueryRows, BackendError> {
        self.parse(request, body, |body| rows::read(body, limit as usize))
    }
}
