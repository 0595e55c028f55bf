//! The methods of MCP that rmcp knows and this server does not serve: refused as rmcp would refuse them, and counted, which rmcp
//! would not. What rmcp does not know either comes to `on_custom_request`.

/// Methods for `impl ServerHandler for ToolServer`.
macro_rules! unserved_methods {
    () => {
        unserved_methods! {
            complete(rmcp::model::CompleteRequestParams) -> rmcp::model::CompleteResult = CompleteRequestMethod;
            set_level(rmcp::model::SetLevelRequestParams) -> () = SetLevelRequestMethod;
            get_prompt(rmcp::model::GetPromptRequestParams) -> rmcp::model::GetPromptResponse = GetPromptRequestMethod;
            list_prompts(Option<PaginatedRequestParams>) -> rmcp::model::ListPromptsResult = ListPromptsRequestMethod;
            list_resources(Option<PaginatedRequestParams>) -> rmcp::model::ListResourcesResult
                = ListResourcesRequestMethod;
            list_resource_templates(Option<PaginatedRequestParams>) -> rmcp::model::ListResourceTemplatesResult
                = ListResourceTemplatesRequestMethod;
            read_resource(rmcp::model::ReadResourceRequestParams) -> rmcp::model::ReadResourceResponse
                = ReadResourceRequestMethod;
            subscribe(rmcp::model::SubscribeRequestParams) -> () = SubscribeRequestMethod;
            unsubscribe(rmcp::model::UnsubscribeRequestParams) -> () = UnsubscribeRequestMethod;
        }
    };
    ($($name:ident($params:ty) -> $answer:ty = $method:ident;)*) => {$(
        #[allow(deprecated, reason = "what clients of older revisions may ask for is refused all the same")]
        async fn $name(&self, _: $params, context: RequestContext<RoleServer>) -> Result<$answer, ErrorData> {
            let error = ErrorData::method_not_found::<rmcp::model::$method>();
            self.answered(Operation::Other, context.protocol_version(), &context, || Err(error))
        }
    )*};
}

pub(super) use unserved_methods;
