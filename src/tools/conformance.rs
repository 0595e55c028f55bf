//! The tools that the official conformance suite calls by name: fixtures, which show what rmcp and our layers do with them.
//!
//! Only in a build with the feature `conformance`, which no release has: it does not compile without debug assertions. What is
//! not here is what a server of tools alone has no use for: prompts, resources, sampling and questions to the client.

use std::sync::Arc;
use std::time::Duration;

use rmcp::model::{
    CallToolRequestParams, CallToolResult, ContentBlock, ErrorCode, ProgressNotificationParam, ResourceContents, Tool,
};
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer};
use serde_json::{Map, Value, json};

#[cfg(not(debug_assertions))]
compile_error!("the feature `conformance` adds tools for tests: it has no place in a release");

/// One red pixel.
const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg==";
/// No sound at all.
const WAV: &str = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA=";

const NAMES: [&str; 11] = [
    "test_simple_text",
    "test_image_content",
    "test_audio_content",
    "test_embedded_resource",
    "test_multiple_content_types",
    "test_error_handling",
    "test_tool_with_progress",
    "test_missing_capability",
    "test_streaming_elicitation",
    "test_logging_tool",
    "json_schema_2020_12_tool",
];
const WITH_HEADER: &str = "test_header_parameter";

/// What `tools/list` says of them.
pub(super) fn definitions() -> impl Iterator<Item = Tool> {
    let header = json!({
        "type": "object",
        "properties": { "region": { "type": "string", "x-mcp-header": "Region" } },
    });
    NAMES
        .into_iter()
        .map(|name| {
            (name, if name == "json_schema_2020_12_tool" { rich_schema() } else { json!({ "type": "object" }) })
        })
        .chain([(WITH_HEADER, header)])
        .map(|(name, schema)| {
            let schema = schema.as_object().cloned().unwrap_or_else(Map::new);
            Tool::new(name, "A fixture of the conformance suite.", Arc::new(schema))
        })
}

/// The schema that the suite gives, to see that no keyword is lost on the way.
fn rich_schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": { "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": { "street": { "type": "string" }, "city": { "type": "string" } },
        } },
        "properties": {
            "name": { "type": "string" },
            "address": { "$ref": "#/$defs/address" },
            "contactMethod": { "type": "string", "enum": ["phone", "email"] },
            "phone": { "type": "string" },
            "email": { "type": "string" },
        },
        "allOf": [{ "anyOf": [{ "required": ["phone"] }, { "required": ["email"] }] }],
        "if": { "properties": { "contactMethod": { "const": "phone" } }, "required": ["contactMethod"] },
        "then": { "required": ["phone"] },
        "else": { "required": ["email"] },
        "additionalProperties": false,
    })
}

/// Runs one of them.
pub(super) async fn call(
    request: &CallToolRequestParams,
    context: &RequestContext<RoleServer>,
) -> Result<CallToolResult, ErrorData> {
    let content = match &*request.name {
        "test_simple_text" => vec![ContentBlock::text("This is a simple text response for testing.")],
        "test_image_content" => vec![ContentBlock::image(PNG, "image/png")],
        "test_audio_content" => vec![ContentBlock::audio(WAV, "audio/wav")],
        "test_embedded_resource" => vec![ContentBlock::resource(ResourceContents::text(
            "This is an embedded resource content.",
            "test://embedded-resource",
        ))],
        "test_multiple_content_types" => vec![
            ContentBlock::text("Multiple content types test:"),
            ContentBlock::image(PNG, "image/png"),
            ContentBlock::resource(ResourceContents::text(
                json!({ "test": "data", "value": 123 }).to_string(),
                "test://mixed-content-resource",
            )),
        ],
        "test_error_handling" => {
            let text = "This tool intentionally returns an error for testing";
            return Ok(CallToolResult::error(vec![ContentBlock::text(text)]));
        }
        "test_tool_with_progress" => {
            report_progress(context).await?;
            vec![ContentBlock::text("done")]
        }
        "test_missing_capability" => {
            if context.client_capabilities().is_none_or(|client| client.sampling.is_none()) {
                let required = json!({ "requiredCapabilities": { "sampling": {} } });
                return Err(ErrorData::new(
                    ErrorCode::MISSING_REQUIRED_CLIENT_CAPABILITY,
                    "this tool needs sampling",
                    Some(required),
                ));
            }
            vec![ContentBlock::text("the client can sample")]
        }
        // The last three are only listed, or must not do what their names say.
        _ => vec![ContentBlock::text("nothing was asked of the client, and nothing logged to it")],
    };
    Ok(CallToolResult::success(content))
}

async fn report_progress(context: &RequestContext<RoleServer>) -> Result<(), ErrorData> {
    let token = context.meta.get_progress_token();
    for progress in [0.0, 50.0, 100.0] {
        if let Some(token) = &token {
            let message = ProgressNotificationParam::new(token.clone(), progress).with_total(100.0);
            let sent = context.peer.notify_progress(message).await;
            sent.map_err(|error| ErrorData::internal_error(error.to_string(), None))?;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
