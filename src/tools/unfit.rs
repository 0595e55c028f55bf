//! What is wrong with the parameters of a method that this server has: rmcp takes a request whose parameters it cannot decode for one of
//! a method that it does not know.

use rmcp::model::{ClientCapabilities, Implementation};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::args::type_of;

/// Every unfit parameter by its name, its type and what is accepted. Values are not repeated.
pub(super) fn unfit(method: &str, params: Option<&Value>) -> String {
    let none = Map::new();
    let params = params.and_then(Value::as_object).unwrap_or(&none);
    let mut wrong = Vec::new();
    match method {
        "initialize" => {
            wrong.extend(unlike(params, "", "protocolVersion", "a string such as \"2025-11-25\"", Value::is_string));
            wrong.extend(unlike(params, "", "capabilities", "an object", Value::is_object));
            wrong.extend(unlike(params, "", "clientInfo", "an object with `name` and `version`", Value::is_object));
            let members = |name: &str| params.get(name).and_then(Value::as_object);
            if let Some(capabilities) = members("capabilities") {
                let form = "an object as in the MCP specification";
                wrong.extend(undecodable::<ClientCapabilities>(capabilities, "capabilities.", form, &Map::new()));
            }
            if let Some(info) = members("clientInfo") {
                wrong.extend(unlike(info, "clientInfo.", "name", "a string", Value::is_string));
                wrong.extend(unlike(info, "clientInfo.", "version", "a string", Value::is_string));
                let least = Map::from_iter(["name", "version"].map(|name| (name.to_owned(), json!(""))));
                wrong.extend(undecodable::<Implementation>(info, "clientInfo.", "as in the MCP specification", &least));
            }
        }
        "tools/call" => {
            wrong.extend(unlike(params, "", "name", "a string, the name of a tool", Value::is_string));
            if params.get("arguments").is_some_and(|arguments| !arguments.is_null()) {
                wrong.extend(unlike(params, "", "arguments", "an object, not text that holds one", Value::is_object));
            }
        }
        _ => {}
    }
    if wrong.is_empty() {
        return format!("The parameters of `{method}` do not have the form that it takes.");
    }
    format!("The parameters of `{method}` do not fit: {}.", wrong.join("; "))
}

/// What is wrong with a member that has to be there.
fn unlike(
    object: &Map<String, Value>,
    path: &str,
    name: &str,
    accepted: &str,
    is_accepted: fn(&Value) -> bool,
) -> Option<String> {
    match object.get(name) {
        None => Some(format!("`{path}{name}` is missing; it must be {accepted}")),
        Some(value) if is_accepted(value) => None,
        Some(value) => Some(format!("`{path}{name}` is {}; it must be {accepted}", type_of(value))),
    }
}

/// The optional members that do not decode, each put alone beside those that have to be there. What `T` does not know decodes, so all
/// names are MCP's.
fn undecodable<T: DeserializeOwned>(
    members: &Map<String, Value>,
    path: &str,
    accepted: &str,
    required: &Map<String, Value>,
) -> Vec<String> {
    let decodes = |name: &String, value: &Value| {
        let mut object = required.clone();
        object.insert(name.clone(), value.clone());
        serde_json::from_value::<T>(object.into()).is_ok()
    };
    let wrong = members.iter().filter(|(name, value)| !required.contains_key(*name) && !decodes(name, value));
    wrong.map(|(name, value)| format!("`{path}{name}` is {}; it must be {accepted}", type_of(value))).collect()
}
