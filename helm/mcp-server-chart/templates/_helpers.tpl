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

{{/* What every pod of the release has in common: the server's and that of `helm test`. */}}
{{- define "mcp-server.commonSelectorLabels" -}}
app.kubernetes.io/name: {{ include "mcp-server.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What only the server's pods have. */}}
{{- define "mcp-server.selectorLabels" -}}
{{ include "mcp-server.commonSelectorLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* The labels of the chart itself, which no value replaces. */}}
{{- define "mcp-server.ownLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "mcp-server.commonSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ include "mcp-server.name" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
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

{{/* `env` and `envFrom` of the server, and of `mcp-server check` in the pod of `helm test`. */}}
{{- define "mcp-server.environment" -}}
{{- $identity := include "mcp-server.workloadIdentity" . -}}
{{- $webhook := include "mcp-server.webhook" . -}}
{{- if or (not $webhook) .Values.otlp.existingSecret .Values.extraEnv }}
env:
  {{- if not $webhook }}
  - name: AZURE_TENANT_ID
    value: {{ .Values.azure.tenantId | quote }}
  - name: AZURE_CLIENT_ID
    value: {{ .Values.azure.clientId | quote }}
  {{- with .Values.azure.authorityHost }}
  - name: AZURE_AUTHORITY_HOST
    value: {{ . | quote }}
  {{- end }}
  {{- if $identity }}
  - name: AZURE_FEDERATED_TOKEN_FILE
    value: {{ include "mcp-server.federatedTokenFile" . | quote }}
  {{- else }}
  - name: AZURE_CLIENT_SECRET
    valueFrom:
      secretKeyRef:
        name: {{ .Values.azure.existingSecret }}
        key: {{ .Values.azure.existingSecretKey }}
  {{- end }}
  {{- end }}
  {{- with .Values.otlp.existingSecret }}
  - name: OTEL_EXPORTER_OTLP_HEADERS
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: {{ $.Values.otlp.existingSecretKey }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- tpl (toYaml .) $ | nindent 2 }}
  {{- end }}
{{- end }}
envFrom:
  - configMapRef:
      name: {{ include "mcp-server.fullname" . }}
  {{- with .Values.existingConfigMap }}
  - configMapRef:
      name: {{ . }}
  {{- end }}
  {{- with .Values.envFrom }}
  {{- tpl (toYaml .) $ | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "mcp-server.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if and (include "mcp-server.workloadIdentity" .) (not .Values.workloadIdentity.webhook) }}
- name: azure-identity-token
  mountPath: {{ include "mcp-server.federatedTokenFile" . | dir }}
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ tpl (toYaml .) $ }}
{{- end }}
{{- end -}}

{{- define "mcp-server.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 64Mi
{{- if and (include "mcp-server.workloadIdentity" .) (not .Values.workloadIdentity.webhook) }}
- name: azure-identity-token
  projected:
    sources:
      - serviceAccountToken:
          audience: api://AzureADTokenExchange
          expirationSeconds: {{ int64 .Values.workloadIdentity.tokenExpirationSeconds }}
          path: {{ include "mcp-server.federatedTokenFile" . | base }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ tpl (toYaml .) $ }}
{{- end }}
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
serviceAccountName: {{ include "mcp-server.serviceAccountName" . }}
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
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
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

{{/* Seconds of preStop, of the program's grace, and of the last logs: what a pod needs to end in good order. */}}
{{- define "mcp-server.shutdownSeconds" -}}
{{- $preStop := dig "preStop" "sleep" "seconds" 0 (.Values.lifecycle | default dict) -}}
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
