//! Users, as the backend sends them.

use schemars::JsonSchema;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::record::{self, Object, Record, cut, is_false};
use super::{BackendClient, BackendError, Call, Outgoing, Route, Segment};
use crate::json;

/// A person known to the backend, with what it says of them. Fields that it adds are dropped here.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct User {
    /// The user's id, as `get_user_profile` takes it.
    #[serde(deserialize_with = "record::id")]
    pub id: String,
    /// The full name.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub name: Option<String>,
    /// The e-mail address.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub email: Option<String>,
    /// When the account was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub created_at: Option<String>,
    /// Whatever else the backend knows of the user; only when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "compact")]
    #[schemars(with = "Map<String, Value>")]
    pub details: Option<Box<RawValue>>,
}

impl Record for User {
    const NAME: &'static str = "a user";
}

/// An object that nobody looks into: it stays text, and never becomes a tree.
fn compact<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Box<RawValue>>, D::Error> {
    let Some(sent) = Option::<&RawValue>::deserialize(input)? else { return Ok(None) };
    let compact = json::object(sent.get()).map_err(D::Error::custom)?;
    // Most backends send it so, and then it need not be read once more.
    let compact = if compact == sent.get() { Ok(sent.to_owned()) } else { RawValue::from_string(compact) };
    compact.map(Some).map_err(D::Error::custom)
}

/// A page of users.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct UserPage {
    /// How many users there are in all.
    pub total: u64,
    /// The users of this page, no more than were asked for.
    #[serde(deserialize_with = "record::items")]
    pub items: Vec<User>,
    /// Whether the backend sent more.
    #[serde(skip_deserializing, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

impl BackendClient {
    /// `GET /users/{user_id}`.
    ///
    /// # Errors
    ///
    /// [`BackendError`], as every method here.
    pub async fn user(&self, call: &Call, id: &Segment, include_details: bool) -> Result<User, BackendError> {
        let mut url = self.url(&["users", id.as_str()]);
        if include_details {
            url.set_query(Some("include_details=true"));
        }
        let Object(mut user): Object<User> = self.send(call, Outgoing::read(Route::User, url)).await?;
        if !include_details {
            user.details = None;
        }
        Ok(user)
    }

    /// `GET /users?skip&limit`.
    ///
    /// # Errors
    ///
    /// [`BackendError`], as every method here.
    pub async fn users(&self, call: &Call, skip: u64, limit: u32) -> Result<UserPage, BackendError> {
        let mut url = self.url(&["users"]);
        url.set_query(Some(&format!("skip={skip}&limit={limit}")));
        let mut page: UserPage = self.send(call, Outgoing::read(Route::Users, url)).await?;
        page.truncated = cut(&mut page.items, limit);
        Ok(page)
    }
}
