//! Where a tool leaves word that its caller has to sign in once more. Its result says so to the model; the HTTP answer has to say it to
//! the client, and is made when the tool has ended.

use std::sync::{Arc, OnceLock};

use crate::problem::Problem;

/// One for each request of a caller with an identity, in its extensions.
#[derive(Debug, Clone, Default)]
pub struct StepUp(Arc<OnceLock<Problem>>);

impl StepUp {
    /// Asks for a token that satisfies `problem.details.claims`. The first word counts.
    pub fn demand(&self, problem: &Problem) {
        let _ = self.0.set(problem.clone());
    }

    /// What was asked for, if anything was.
    pub fn demanded(&self) -> Option<&Problem> {
        self.0.get()
    }
}
