{{/* What a schema cannot see. Each message names the value and the remedy. */}}
{{- define "mcp-server.guards" -}}
{{- $identity := include "mcp-server.workloadIdentity" . -}}
{{- $webhook := include "mcp-server.webhook" . -}}

{{- /* Identity. */ -}}
{{- if or (not .Values.azure.clientId) (not .Values.azure.tenantId) -}}
{{- fail "azure.clientId and azure.tenantId are required: add `--set azure.clientId=<client id> --set azure.tenantId=<tenant id>`. With workload identity they are those of the user-assigned managed identity (`az identity show --query '{clientId:clientId,tenantId:tenantId}'`)." -}}
{{- end -}}
{{- if and $identity .Values.azure.existingSecret -}}
{{- fail "workloadIdentity.enabled is true while azure.existingSecret names a client secret, which would never be used: drop one of the two." -}}
{{- end -}}
{{- if and (not $identity) (not .Values.azure.existingSecret) -}}
{{- fail "workloadIdentity.enabled is false, so azure.existingSecret must name the Secret that holds the client secret." -}}
{{- end -}}
{{- if and $webhook .Values.azure.authorityHost -}}
{{- fail "azure.authorityHost has no place beside the workload identity webhook, which sets the authority of the cluster's cloud: drop it, or set workloadIdentity.webhook=false." -}}
{{- end -}}
{{- if and .Values.azure.federatedTokenFile (or $webhook (not $identity)) -}}
{{- fail "azure.federatedTokenFile is used only with workload identity and workloadIdentity.webhook=false: the webhook chooses its own path. Drop it." -}}
{{- end -}}
{{- $webhookVariables := list "AZURE_CLIENT_ID" "AZURE_TENANT_ID" "AZURE_AUTHORITY_HOST" "AZURE_FEDERATED_TOKEN_FILE" -}}
{{- $names := list -}}
{{- range (include "mcp-server.extraEnv" . | fromJson).value -}}
{{- if has .name $names -}}
{{- fail (printf "extraEnv sets %s twice: drop one of the two." .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if and (has .name $webhookVariables) $webhook -}}
{{- fail (printf "extraEnv sets %s, which would hide the value of the workload identity webhook: drop it, or set workloadIdentity.webhook=false." .name) -}}
{{- end -}}
{{- if and (eq .name "AZURE_CLIENT_SECRET") .value -}}
{{- fail "extraEnv holds AZURE_CLIENT_SECRET as a plain value, which stays readable in the release: put it into a Secret and name that in azure.existingSecret." -}}
{{- end -}}
{{- end -}}
{{- range $labels := list .Values.podLabels .Values.commonLabels -}}
{{- if hasKey ($labels | default dict) "azure.workload.identity/use" -}}
{{- fail "podLabels and commonLabels must not hold azure.workload.identity/use: workloadIdentity.enabled sets it." -}}
{{- end -}}
{{- range $key, $_ := ($labels | default dict) -}}
{{- if hasPrefix "kubernetes.azure.com" $key -}}
{{- fail (printf "podLabels and commonLabels must not hold %s: labels of kubernetes.azure.com belong to AKS, which refuses them." $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Image. */ -}}
{{- if and .Values.image.digest (not (regexMatch "^sha256:[0-9a-f]{64}$" .Values.image.digest)) -}}
{{- fail (printf "image.digest is %q; expected `sha256:` and 64 hexadecimal digits, as `az acr manifest show-metadata` prints it." .Values.image.digest) -}}
{{- end -}}
{{- if kindIs "float64" .Values.image.tag | or (kindIs "int64" .Values.image.tag) -}}
{{- fail (printf "image.tag is a number (%v), which YAML may have changed: quote it, or use `--set-string image.tag=…`." .Values.image.tag) -}}
{{- end -}}
{{- if and (not .Values.image.digest) (eq (toString .Values.image.tag) "latest") -}}
{{- fail "image.tag is `latest`, which AKS deployment safeguards refuse and no rollback can undo: name a version, or set image.digest." -}}
{{- end -}}

{{- /* How many. */ -}}
{{- with .Values.autoscaling -}}
{{- if .enabled -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas (%d) is above autoscaling.maxReplicas (%d)." (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if not (or .targetCPUUtilizationPercentage .targetMemoryUtilizationPercentage) -}}
{{- fail "autoscaling.targetCPUUtilizationPercentage and autoscaling.targetMemoryUtilizationPercentage are both null: set one, or autoscaling.enabled=false." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.podDisruptionBudget -}}
{{- $most := not (kindIs "invalid" .maxUnavailable) -}}
{{- $least := not (kindIs "invalid" .minAvailable) -}}
{{- if and .enabled (eq $most $least) -}}
{{- fail "podDisruptionBudget takes exactly one of maxUnavailable and minAvailable: set the other one to null." -}}
{{- end -}}
{{- end -}}

{{- /* What the API server refuses. */ -}}
{{- with .Values.strategy -}}
{{- $rolling := .rollingUpdate | default dict -}}
{{- if and (eq .type "RollingUpdate") (has (toString $rolling.maxUnavailable) (list "0" "0%")) (has (toString $rolling.maxSurge) (list "0" "0%")) -}}
{{- fail "strategy.rollingUpdate has maxUnavailable and maxSurge of 0, so no pod could ever be replaced: raise one of the two." -}}
{{- end -}}
{{- end -}}
{{- if le (int .Values.progressDeadlineSeconds) (int .Values.minReadySeconds) -}}
{{- fail (printf "progressDeadlineSeconds (%d) must be more than minReadySeconds (%d)." (int .Values.progressDeadlineSeconds) (int .Values.minReadySeconds)) -}}
{{- end -}}
{{- range $name, $resources := dict "resources" .Values.resources "tests.resources" .Values.tests.resources -}}
{{- range $kind, $request := ($resources.requests | default dict) -}}
{{- $limit := get ($resources.limits | default dict) $kind -}}
{{- if include "mcp-server.exceeds" (list $request $limit) -}}
{{- fail (printf "%s.requests.%s (%v) is above %s.limits.%s (%v): lower the request too." $name $kind $request $name $kind $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor.enabled (eq (int .Values.service.port) (int .Values.app.metricsPort)) -}}
{{- fail (printf "service.port and app.metricsPort are both %d, and with monitoring.serviceMonitor the Service has both: change one of the two." (int .Values.service.port)) -}}
{{- end -}}

{{- /* The way in. */ -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs: name the Gateway, for example `--set httpRoute.parentRefs[0].name=<gateway>`." -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts, for example `--set ingress.hosts[0].host=mcp.example.com`." -}}
{{- end -}}
{{- if not .Values.app.allowedHosts -}}
{{- range splitList "," (include "mcp-server.allowedHosts" .) -}}
{{- if contains "*" . -}}
{{- fail (printf "`%s` among httpRoute.hostnames, ingress.hosts or extraAllowedHosts is a pattern, and ALLOWED_HOSTS knows none: list the full names, or set app.allowedHosts yourself." .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The program's settings. */ -}}
{{- if not .Values.app.backendApiUrl -}}
{{- fail "app.backendApiUrl is empty: set it to the base URL of the backend, for example `--set app.backendApiUrl=https://api.internal`." -}}
{{- end -}}
{{- if eq (int .Values.app.port) (int .Values.app.metricsPort) -}}
{{- fail (printf "app.port and app.metricsPort are both %d: the two listeners need ports of their own." (int .Values.app.port)) -}}
{{- end -}}
{{- if gt (float64 .Values.app.drainDelay) (float64 .Values.app.shutdownGrace) -}}
{{- fail (printf "app.drainDelay (%v) is longer than app.shutdownGrace (%v), of which it is a part." .Values.app.drainDelay .Values.app.shutdownGrace) -}}
{{- end -}}
{{- if lt (include "mcp-server.terminationGracePeriodSeconds" . | int) (include "mcp-server.shutdownSeconds" . | int) -}}
{{- fail (printf "terminationGracePeriodSeconds (%s) is less than lifecycle.preStop.sleep.seconds + app.shutdownGrace + 5 = %s: calls in flight would be killed. Raise it, or set it to null." (include "mcp-server.terminationGracePeriodSeconds" .) (include "mcp-server.shutdownSeconds" .)) -}}
{{- end -}}

{{- with .Values.app -}}
{{- if and .auditRequired (not .auditLogFile) (not (include "mcp-server.setElsewhere" (list $ "AUDIT_LOG_FILE"))) -}}
{{- fail "app.auditRequired is true, but app.auditLogFile is empty: name the file, or leave both out." -}}
{{- end -}}
{{- if and .readOnly .enabledTools (not (without .enabledTools "create_ticket")) -}}
{{- fail "app.enabledTools lists only tools that app.readOnly switches off: add another, or leave one of the two out." -}}
{{- end -}}
{{- if and .oboAppFallback (eq .backendAuth "server") (not (include "mcp-server.setElsewhere" (list $ "BACKEND_AUTH"))) -}}
{{- fail "app.oboAppFallback is true, which has no meaning unless app.backendAuth is `on-behalf-of`." -}}
{{- end -}}
{{- end -}}

{{- /* Callers. */ -}}
{{- with .Values.app -}}
{{- if eq .inboundAuth "entra" -}}
{{- if not (or .inboundAudience (include "mcp-server.setElsewhere" (list $ "INBOUND_AUDIENCE"))) -}}
{{- fail "app.inboundAuth is `entra`, so app.inboundAudience is required: the client id of this server's app registration, for example `--set app.inboundAudience[0]=<client id>`." -}}
{{- end -}}
{{- if not (or .publicUrl (include "mcp-server.setElsewhere" (list $ "PUBLIC_URL"))) -}}
{{- fail "app.inboundAuth is `entra`, so app.publicUrl is required: the URL that clients use, for example `--set app.publicUrl=https://mcp.example.com/mcp`." -}}
{{- end -}}
{{- $guid := "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$" -}}
{{- if not (or .inboundTenants (regexMatch $guid $.Values.azure.tenantId) (include "mcp-server.setElsewhere" (list $ "INBOUND_TENANTS"))) -}}
{{- fail "app.inboundTenants is required with app.inboundAuth=entra when azure.tenantId is a domain name, because tokens name tenants by their GUID: set it to the tenant's GUID." -}}
{{- end -}}
{{- if and (eq .backendAuth "on-behalf-of") .inboundAudience -}}
{{- $audiences := join "," .inboundAudience | lower -}}
{{- if not (or (has (lower $.Values.azure.clientId) (splitList "," $audiences)) (contains "://" $audiences) (include "mcp-server.setElsewhere" (list $ "INBOUND_AUDIENCE"))) -}}
{{- fail "app.backendAuth is `on-behalf-of`, but app.inboundAudience does not list azure.clientId: Entra lets a token be exchanged only by the app that it is for." -}}
{{- end -}}
{{- end -}}
{{- else if not (include "mcp-server.setElsewhere" (list $ "INBOUND_AUTH")) -}}
{{- range $key := list "inboundAudience" "inboundTenants" "inboundClients" "inboundScopeNames" "inboundRoleNames" -}}
{{- if get $.Values.app $key -}}
{{- fail (printf "app.%s is set, but app.inboundAuth is not `entra`, so no token would be checked: set app.inboundAuth=entra, or drop it." $key) -}}
{{- end -}}
{{- end -}}
{{- if eq .backendAuth "on-behalf-of" -}}
{{- fail "app.backendAuth is `on-behalf-of`, which exchanges the caller's token: set app.inboundAuth=entra too." -}}
{{- end -}}
{{- if .forwardCaller -}}
{{- fail "app.forwardCaller is true, but callers are known only with app.inboundAuth=entra." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Monitoring. */ -}}
{{- with .Values.monitoring -}}
{{- if and .podMonitor.enabled .serviceMonitor.enabled -}}
{{- fail "monitoring.podMonitor.enabled and monitoring.serviceMonitor.enabled are both true: every pod would be scraped twice. Choose one." -}}
{{- end -}}
{{- if and (or .podMonitor.enabled .serviceMonitor.enabled) (eq (int $.Values.app.metricsPort) 0) -}}
{{- fail "monitoring.podMonitor or monitoring.serviceMonitor is enabled while app.metricsPort is 0: there is nothing to scrape." -}}
{{- end -}}
{{- end -}}
{{- end -}}
