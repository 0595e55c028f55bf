//! The tools about users.

use schemars::JsonSchema;
use serde::Deserialize;
use validator::Validate;

use super::args::{MAX_SAFE_INTEGER, SEGMENT_PATTERN};
use super::error::{ProblemExt as _, segment};
use super::{Effect, Tool};
use crate::backend::{BackendClient, Call, User, UserPage};
use crate::problem::Problem;

/// Look up one user by id: name, e-mail address, when the account was made. Find ids with `list_users`.
#[derive(Debug, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub(super) struct GetUserProfile {
    /// The user's id.
    #[validate(length(min = 1, max = 128))]
    #[schemars(extend("pattern" = SEGMENT_PATTERN))]
    user_id: String,
    /// Also return `details`: whatever else is known of the user.
    #[serde(default)]
    include_details: bool,
}

impl Tool for GetUserProfile {
    const NAME: &'static str = "get_user_profile";
    const TITLE: &'static str = "Get user profile";
    const EFFECT: Effect = Effect::Reads;
    type Output = User;

    async fn run(self, backend: &BackendClient, call: &Call) -> Result<User, Problem> {
        let id = segment("user_id", self.user_id)?;
        backend.user(call, &id, self.include_details).await.or_problem(|| format!("user `{id}`"))
    }
}

/// List users, a page at a time. `total` tells how many there are; go on with `skip`.
#[derive(Debug, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub(super) struct ListUsers {
    /// How many users to pass over.
    #[serde(default)]
    #[validate(range(min = 0, max = MAX_SAFE_INTEGER))]
    skip: u64,
    /// How many users to return at most.
    #[serde(default = "default_limit")]
    #[validate(range(min = 1, max = 100))]
    limit: u32,
}

/// The size of a page when the caller names none.
pub(super) fn default_limit() -> u32 {
    10
}

impl Tool for ListUsers {
    const NAME: &'static str = "list_users";
    const TITLE: &'static str = "List users";
    const EFFECT: Effect = Effect::Reads;
    type Output = UserPage;

    async fn run(self, backend: &BackendClient, call: &Call) -> Result<UserPage, Problem> {
        backend.users(call, self.skip, self.limit).await.or_problem(|| "list of users".to_owned())
    }
}
