//! The shortest way through everything.

use serde_json::json;

use crate::support::{Era, TestApp};

#[tokio::test]
async fn a_call_goes_through_the_whole_path_in_both_eras() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        let result = app.call(era, "get_user_profile", json!({ "user_id": "42" })).await;
        assert_eq!(result.structured()["id"], "42", "{era:?}");
    }
    let requests = app.backend_requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[0].target, "/users/42");
}
