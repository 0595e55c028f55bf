{{/* Names and labels. */}}
{{- define "mcp-server.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "mcp-server.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Room for a suffix within 63 characters. Call with (list . "suffix"). */}}
{{- define "mcp-server.suffixed" -}}
{{- $suffix := index . 1 -}}
{{- printf "%s-%s" (include "mcp-server.fullname" (index . 0) | trunc (int (sub 62 (len $suffix))) | trimSuffix "-") $suffix -}}
{{- end -}}

{{- define "mcp-server.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mcp-server.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The labels that every pod of the release has: the server's and that of `helm test`. */}}
{{- define "mcp-server.commonSelectorLabels" -}}
app.kubernetes.io/name: {{ include "mcp-server.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* What only the server's pods have. */}}
{{- define "mcp-server.selectorLabels" -}}
{{ include "mcp-server.commonSelectorLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* The labels of the chart itself, which no value replaces. */}}
{{- define "mcp-server.ownLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{ include "mcp-server.commonSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ include "mcp-server.name" . | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end -}}

{{- define "mcp-server.labels" -}}
{{- merge (include "mcp-server.ownLabels" . | fromYaml) (.Values.commonLabels | default dict) | toYaml -}}
{{- end -}}

{{/* The annotations of one object, in its `metadata`: its own, and those of all. Call with (list . ownMap). */}}
{{- define "mcp-server.annotations" -}}
{{- $root := index . 0 -}}
{{- with mergeOverwrite (deepCopy ($root.Values.commonAnnotations | default dict)) ((index . 1) | default dict) }}
  annotations:
    {{- toYaml . | nindent 4 }}
{{- end -}}
{{- end -}}

{{- define "mcp-server.image" -}}
{{- $repository := .Values.image.repository -}}
{{- with .Values.image.registry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion | toString) -}}
{{- end -}}
{{- end -}}

{{/* "true" or nothing: whether the pods use workload identity. */}}
{{- define "mcp-server.workloadIdentity" -}}
{{- $enabled := .Values.workloadIdentity.enabled -}}
{{- if kindIs "bool" $enabled -}}
{{- if $enabled }}true{{ end -}}
{{- else if not .Values.azure.existingSecret -}}
true
{{- end -}}
{{- end -}}

{{/* "true" or nothing: whether the webhook of workload identity is to change the pods. */}}
{{- define "mcp-server.webhook" -}}
{{- if and (include "mcp-server.workloadIdentity" .) .Values.workloadIdentity.webhook }}true{{ end -}}
{{- end -}}

{{- define "mcp-server.federatedTokenFile" -}}
{{- default "/var/run/secrets/azure/tokens/token" .Values.azure.federatedTokenFile -}}
{{- end -}}

{{/* Text in `extra…` values may be a template. Each text is expanded by itself, so that its result stays one text whatever it
     looks like. Call with (list . value); the result is JSON, under the key `value`. */}}
{{- define "mcp-server.expanded" -}}
{{- $root := index . 0 -}}
{{- $value := index . 1 -}}
{{- $result := $value -}}
{{- if kindIs "string" $value -}}
{{- $result = tpl $value $root -}}
{{- else if kindIs "map" $value -}}
{{- $result = dict -}}
{{- range $key, $item := $value -}}
{{- $_ := set $result (tpl $key $root) (include "mcp-server.expanded" (list $root $item) | fromJson | dig "value" nil) -}}
{{- end -}}
{{- else if kindIs "slice" $value -}}
{{- $result = list -}}
{{- range $value -}}
{{- $result = append $result (include "mcp-server.expanded" (list $root .) | fromJson | dig "value" nil) -}}
{{- end -}}
{{- end -}}
{{- dict "value" $result | toJson -}}
{{- end -}}

{{/* The same as YAML. */}}
{{- define "mcp-server.expandedYaml" -}}
{{- include "mcp-server.expanded" . | fromJson | dig "value" nil | toYaml -}}
{{- end -}}

{{/* `extraEnv` with its templates expanded, every value a text; JSON under the key `value`. A number is refused: YAML has
     already changed 1.10 to 1.1. */}}
{{- define "mcp-server.extraEnv" -}}
{{- $entries := list -}}
{{- range (include "mcp-server.expanded" (list . (.Values.extraEnv | default list)) | fromJson).value -}}
{{- $entry := . -}}
{{- if kindIs "float64" .value -}}
{{- fail (printf "extraEnv sets %s to a number, which YAML may have changed: quote it." .name) -}}
{{- else if kindIs "bool" .value -}}
{{- $entry = merge (dict "value" (toString .value)) . -}}
{{- end -}}
{{- $entries = append $entries $entry -}}
{{- end -}}
{{- dict "value" $entries | toJson -}}
{{- end -}}

{{/* "true" or nothing: whether a variable may be set by something other than `app` and `azure`. Call with (list . "NAME"). */}}
{{- define "mcp-server.setElsewhere" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- if or $root.Values.existingConfigMap $root.Values.envFrom }}true{{ end -}}
{{- range (include "mcp-server.extraEnv" $root | fromJson).value -}}
{{- if eq .name $name }}true{{ end -}}
{{- end -}}
{{- end -}}

{{- define "mcp-server.allowedHosts" -}}
{{- $hosts := list "localhost" "127.0.0.1" "[::1]" -}}
{{- $service := include "mcp-server.fullname" . -}}
{{- $namespace := .Release.Namespace -}}
{{- $hosts = concat $hosts (list
      $service
      (printf "%s.%s" $service $namespace)
      (printf "%s.%s.svc" $service $namespace)
      (printf "%s.%s.svc.%s" $service $namespace .Values.clusterDomain)) -}}
{{- if .Values.httpRoute.enabled -}}
{{- $hosts = concat $hosts (.Values.httpRoute.hostnames | default list) -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- range .Values.ingress.hosts -}}
{{- $hosts = append $hosts .host -}}
{{- end -}}
{{- end -}}
{{- with .Values.app.publicUrl -}}
{{- $hosts = append $hosts (regexReplaceAll ":[0-9]+$" (urlParse .).host "") -}}
{{- end -}}
{{- concat $hosts (.Values.extraAllowedHosts | default list) | uniq | join "," -}}
{{- end -}}

{{/* A value as the program reads it: lists with commas, numbers without an exponent. */}}
{{- define "mcp-server.text" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else if not (kindIs "invalid" .) -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* The program's settings: every key of `app` under the name of its variable, and the scope. No secret, and none of
     the four variables that the webhook of workload identity sets. */}}
{{- define "mcp-server.settings" -}}
{{- $settings := dict -}}
{{- range $key, $value := .Values.app -}}
{{- $_ := set $settings (regexReplaceAll "([A-Z])" $key "_$1" | upper) (include "mcp-server.text" $value) -}}
{{- end -}}
{{- if not .Values.app.allowedHosts -}}
{{- $_ := set $settings "ALLOWED_HOSTS" (include "mcp-server.allowedHosts" .) -}}
{{- end -}}
{{- $_ := set $settings "AZURE_SCOPES" (include "mcp-server.text" .Values.azure.scopes) -}}
{{- range $name, $text := $settings -}}
{{- if ne $text "" }}
{{ $name }}: {{ $text | quote }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `env` and `envFrom` of the server, and of `mcp-server check` in the pod of `helm test`. `extraEnv` wins: server-side apply
     refuses two entries of one name, so the chart leaves its own out. */}}
{{- define "mcp-server.environment" -}}
{{- $env := list -}}
{{- if not (include "mcp-server.webhook" .) -}}
{{- $env = append $env (dict "name" "AZURE_TENANT_ID" "value" .Values.azure.tenantId) -}}
{{- $env = append $env (dict "name" "AZURE_CLIENT_ID" "value" .Values.azure.clientId) -}}
{{- with .Values.azure.authorityHost -}}
{{- $env = append $env (dict "name" "AZURE_AUTHORITY_HOST" "value" .) -}}
{{- end -}}
{{- if include "mcp-server.workloadIdentity" . -}}
{{- $env = append $env (dict "name" "AZURE_FEDERATED_TOKEN_FILE" "value" (include "mcp-server.federatedTokenFile" .)) -}}
{{- else -}}
{{- $env = append $env (include "mcp-server.secretVariable" (list "AZURE_CLIENT_SECRET" .Values.azure) | fromJson) -}}
{{- end -}}
{{- end -}}
{{- if .Values.otlp.existingSecret -}}
{{- $env = append $env (include "mcp-server.secretVariable" (list "OTEL_EXPORTER_OTLP_HEADERS" .Values.otlp) | fromJson) -}}
{{- end -}}
{{- $extra := (include "mcp-server.extraEnv" . | fromJson).value -}}
{{- $own := list -}}
{{- range $entry := $env -}}
{{- $replaced := false -}}
{{- range $extra -}}
{{- if eq .name $entry.name -}}{{- $replaced = true -}}{{- end -}}
{{- end -}}
{{- if not $replaced -}}{{- $own = append $own $entry -}}{{- end -}}
{{- end -}}
{{- with concat $own $extra }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
envFrom:
  - configMapRef:
      name: {{ include "mcp-server.fullname" . | quote }}
  {{- with .Values.existingConfigMap }}
  - configMapRef:
      name: {{ . | quote }}
  {{- end }}
  {{- with .Values.envFrom }}
  {{- include "mcp-server.expandedYaml" (list $ .) | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A variable from an existing Secret, as JSON. Call with (list "NAME" map with existingSecret and existingSecretKey). */}}
{{- define "mcp-server.secretVariable" -}}
{{- $secret := index . 1 -}}
{{- $reference := dict "name" $secret.existingSecret "key" $secret.existingSecretKey -}}
{{- dict "name" (index . 0) "valueFrom" (dict "secretKeyRef" $reference) | toJson -}}
{{- end -}}

{{/* "true" or nothing: whether the chart projects the service-account token itself. */}}
{{- define "mcp-server.ownProjection" -}}
{{- if and (include "mcp-server.workloadIdentity" .) (not .Values.workloadIdentity.webhook) }}true{{ end -}}
{{- end -}}

{{/* An entry of `extraVolumeMounts` replaces the chart's own for the same path. */}}
{{- define "mcp-server.volumeMounts" -}}
{{- $extra := (include "mcp-server.expanded" (list . (.Values.extraVolumeMounts | default list)) | fromJson).value -}}
{{- $taken := list -}}
{{- range $extra }}{{ $taken = append $taken (clean .mountPath) }}{{ end -}}
{{- $mounts := list -}}
{{- if not (has "/tmp" $taken) -}}
{{- $mounts = append $mounts (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- end -}}
{{- $folder := include "mcp-server.federatedTokenFile" . | dir -}}
{{- if and (include "mcp-server.ownProjection" .) (not (has $folder $taken)) -}}
{{- $mounts = append $mounts (dict "name" "azure-identity-token" "mountPath" $folder "readOnly" true) -}}
{{- end -}}
{{- concat $mounts $extra | toYaml -}}
{{- end -}}

{{/* An entry of `extraVolumes` replaces the chart's own of the same name. */}}
{{- define "mcp-server.volumes" -}}
{{- $extra := (include "mcp-server.expanded" (list . (.Values.extraVolumes | default list)) | fromJson).value -}}
{{- $taken := list -}}
{{- range $extra }}{{ $taken = append $taken .name }}{{ end -}}
{{- $volumes := list -}}
{{- if not (has "tmp" $taken) -}}
{{- $volumes = append $volumes (dict "name" "tmp" "emptyDir" (dict "sizeLimit" "64Mi")) -}}
{{- end -}}
{{- if and (include "mcp-server.ownProjection" .) (not (has "azure-identity-token" $taken)) -}}
{{- $token := dict
      "audience" "api://AzureADTokenExchange"
      "expirationSeconds" (int64 .Values.workloadIdentity.tokenExpirationSeconds)
      "path" (include "mcp-server.federatedTokenFile" . | base) -}}
{{- $sources := list (dict "serviceAccountToken" $token) -}}
{{- $volumes = append $volumes (dict "name" "azure-identity-token" "projected" (dict "sources" $sources)) -}}
{{- end -}}
{{- concat $volumes $extra | toYaml -}}
{{- end -}}

{{/* The constraints, each with the server's pods as selector where it has none. */}}
{{- define "mcp-server.topologySpreadConstraints" -}}
{{- $selector := dict "matchLabels" (include "mcp-server.selectorLabels" . | fromYaml) -}}
{{- $constraints := list -}}
{{- range .Values.topologySpreadConstraints -}}
{{- $constraints = append $constraints (merge (deepCopy .) (dict "labelSelector" $selector)) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- end -}}

{{/* What the pods of the server and of `helm test` share: identity, security, place. */}}
{{- define "mcp-server.podSpec" -}}
serviceAccountName: {{ include "mcp-server.serviceAccountName" . | quote }}
automountServiceAccountToken: false
# A Service named `metrics` in the namespace would set METRICS_PORT to an address.
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- if kindIs "bool" .Values.hostUsers }}
hostUsers: {{ .Values.hostUsers }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The labels of a pod, which the webhook of workload identity looks at. Call with (list . "component"). */}}
{{- define "mcp-server.podLabels" -}}
{{- $root := index . 0 -}}
{{- $own := include "mcp-server.ownLabels" $root | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/component" (index . 1) -}}
{{- if include "mcp-server.webhook" $root -}}
{{- $_ := set $own "azure.workload.identity/use" "true" -}}
{{- end -}}
{{- merge $own ($root.Values.podLabels | default dict) ($root.Values.commonLabels | default dict) | toYaml -}}
{{- end -}}

{{/* `minReplicas` or `replicaCount`: the fewest pods that are asked for. */}}
{{- define "mcp-server.fewestPods" -}}
{{- if .Values.autoscaling.enabled }}{{ int .Values.autoscaling.minReplicas }}{{ else }}{{ int .Values.replicaCount }}{{ end -}}
{{- end -}}

{{/* `lifecycle` less what does not go together: the sleep of the default beside a handler of `preStop` that replaces it. */}}
{{- define "mcp-server.lifecycle" -}}
{{- $lifecycle := omit (.Values.lifecycle | default dict) "preStop" -}}
{{- with (.Values.lifecycle | default dict).preStop -}}
{{- $_ := set $lifecycle "preStop" (ternary (omit . "sleep") . (or (hasKey . "exec") (hasKey . "httpGet"))) -}}
{{- end -}}
{{- with $lifecycle }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* What an API server accepts: `Recreate` has no settings of a rolling update. */}}
{{- define "mcp-server.strategy" -}}
{{- ternary (pick .Values.strategy "type") .Values.strategy (eq .Values.strategy.type "Recreate") | toYaml -}}
{{- end -}}

{{/* `replicas` while an autoscaler decides, or nothing, which leaves the running number to the autoscaler.
     Where Helm gives the field up, the API server sets it to 1 and pods end at once; so the running number is rendered
     - when there is no autoscaler yet: `replicas` was Helm's, and the pods must not become fewer than `minReplicas`;
     - while the field still belongs to a manager that applied it;
     - where nothing is applied by the server, as with Helm 3, which removes the field if the last manifest had it. */}}
{{- define "mcp-server.runningReplicas" -}}
{{- $name := include "mcp-server.fullname" . -}}
{{- with lookup "apps/v1" "Deployment" .Release.Namespace $name -}}
{{- $running := dig "spec" "replicas" 1 . | int -}}
{{- if not (lookup "autoscaling/v2" "HorizontalPodAutoscaler" $.Release.Namespace $name) -}}
{{- max $running (int $.Values.autoscaling.minReplicas) -}}
{{- else -}}
{{- $applied := false -}}
{{- $owned := false -}}
{{- range dig "metadata" "managedFields" list . -}}
{{- if and (eq .operation "Apply") (not .subresource) -}}
{{- $applied = true -}}
{{- if hasKey (dig "fieldsV1" "f:spec" dict .) "f:replicas" }}{{ $owned = true }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if or $owned (not $applied) }}{{ $running }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether one quantity is more than another: "true" or nothing, also where a unit is unknown. Call with (list a b). */}}
{{- define "mcp-server.exceeds" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $numbers := list -}}
{{- range . -}}
{{- $unit := regexReplaceAll "^[0-9.]+" (toString .) "" -}}
{{- if and (hasKey $units $unit) (regexMatch "^[0-9]" (toString .)) -}}
{{- $numbers = append $numbers (mulf (regexFind "^[0-9.]+" (toString .) | float64) (get $units $unit)) -}}
{{- end -}}
{{- end -}}
{{- if eq (len $numbers) 2 }}{{ if gt (index $numbers 0) (index $numbers 1) }}true{{ end }}{{ end -}}
{{- end -}}

{{/* Seconds that a pod needs to stop in good order: preStop, the program's grace, and the last logs. */}}
{{- define "mcp-server.shutdownSeconds" -}}
{{- $preStop := include "mcp-server.lifecycle" . | fromYaml | dig "preStop" "sleep" "seconds" 0 -}}
{{- add (int $preStop) (ceil .Values.app.shutdownGrace | int) 5 -}}
{{- end -}}

{{- define "mcp-server.terminationGracePeriodSeconds" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{- add (include "mcp-server.shutdownSeconds" . | int) 20 -}}
{{- else -}}
{{- int .Values.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end -}}

{{/* "true" or nothing: whether to render a kind that not every cluster knows. Call with
     (list . "group/version" "Kind" "the value that asks for it"). */}}
{{- define "mcp-server.renderCustom" -}}
{{- $root := index . 0 -}}
{{- $policy := $root.Values.monitoring.missingCRDs -}}
{{- $known := $root.Capabilities.APIVersions.Has (printf "%s/%s" (index . 1) (index . 2)) -}}
{{- if or $known (eq $policy "alwaysRender") -}}
true
{{- else if eq $policy "failIfMissing" -}}
{{- fail (printf "%s is set, but the cluster does not know the kind %s of %s: install its CRDs, or set monitoring.missingCRDs to skipIfMissing. (`helm template` needs `--api-versions %s/%s`.)" (index . 3) (index . 2) (index . 1) (index . 1) (index . 2)) -}}
{{- end -}}
{{- end -}}
