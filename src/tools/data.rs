//! The tool about datasets.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use validator::Validate;

use super::args::SEGMENT_PATTERN;
use super::error::{ProblemExt as _, segment};
use super::{Effect, Output, Tool};
use crate::backend::{BackendClient, Call, Query, QueryRows};
use crate::problem::Problem;

/// Return rows of a dataset, optionally only those that match `filters`.
#[derive(Debug, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryData {
    /// The dataset's name.
    #[validate(length(min = 1, max = 128))]
    #[schemars(extend("pattern" = SEGMENT_PATTERN))]
    dataset: String,
    /// Column names and the values that rows must have in them. At most 8192 bytes as compact JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Map<String, Value>")]
    filters: Option<Filters>,
    /// How many rows to return at most.
    #[serde(default = "default_rows")]
    #[validate(range(min = 1, max = 1000))]
    limit: u32,
}

/// An object as compact JSON. It comes as an object, or as the text of one that has been checked.
#[derive(Debug)]
struct Filters(String);

impl<'de> Deserialize<'de> for Filters {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Ok(Self(match Value::deserialize(input)? {
            Value::String(text) => text,
            object => object.to_string(),
        }))
    }
}

fn default_rows() -> u32 {
    100
}

/// Rows of a dataset.
#[derive(Debug, JsonSchema)]
pub(super) struct QueryResult {
    /// The dataset that was asked.
    dataset: String,
    /// How many rows `data` holds.
    rows: usize,
    /// The rows, with all their columns.
    #[schemars(with = "Vec<Map<String, Value>>")]
    data: String,
    /// Whether the backend sent more rows than were asked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

impl Tool for QueryData {
    const NAME: &'static str = "query_data";
    const TITLE: &'static str = "Query data";
    const EFFECT: Effect = Effect::Reads;
    type Output = QueryResult;

    async fn run(self, backend: &BackendClient, call: &Call) -> Result<QueryResult, Problem> {
        let filters = self.filters.map(|Filters(json)| json);
        let query = Query { dataset: segment("dataset", self.dataset)?, filters, limit: self.limit };
        let answer = backend.query(call, &query).await.or_problem(|| format!("dataset `{}`", query.dataset))?;
        let QueryRows { count, truncated, json } = answer;
        Ok(QueryResult { dataset: query.dataset.to_string(), rows: count, data: json, truncated })
    }
}

impl Output for QueryResult {
    /// `data` is JSON already.
    fn to_json(&self) -> Result<String, serde_json::Error> {
        let dataset = serde_json::to_string(&self.dataset)?;
        let truncated = if self.truncated { r#","truncated":true"# } else { "" };
        Ok(format!(r#"{{"dataset":{dataset},"rows":{},"data":{}{truncated}}}"#, self.rows, self.data))
    }
}
