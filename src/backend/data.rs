//! Rows of the backend's datasets.

use serde::Deserialize;
use serde_json::{Map, Value};
use url::form_urlencoded;

use super::{BackendClient, BackendError, Call, Outgoing, Route, Segment};

/// What `GET /query/{dataset}` is asked.
#[derive(Debug, Clone)]
pub struct Query {
    /// Which dataset.
    pub dataset: Segment,
    /// What the rows must match; the backend says what filters mean.
    pub filters: Option<Map<String, Value>>,
    /// How many rows at most.
    pub limit: u32,
}

/// What it answers.
#[derive(Debug, Clone, Deserialize)]
pub struct QueryRows {
    /// The rows, with all their fields.
    pub data: Vec<Map<String, Value>>,
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
            let filters = serde_json::to_string(filters).unwrap_or_default();
            // As a form would be, but with `%20` for a space: every decoder reads that, and not every one reads `+`.
            let filters = form_urlencoded::byte_serialize(filters.as_bytes()).collect::<String>().replace('+', "%20");
            url.set_query(Some(&format!("limit={}&filters={filters}", query.limit)));
        }
        self.send(call, Outgoing::read(Route::Query, url)).await
    }
}
