{{/* A PodMonitor or a ServiceMonitor, which differ in one word. Call with
     (list . "PodMonitor" values "value name" "endpoints key" "template of what it selects"). */}}
{{- define "mcp-server.monitor" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $values := index . 2 -}}
{{- if include "mcp-server.renderCustom" (list $root $values.apiVersion $kind (index . 3)) }}
apiVersion: {{ $values.apiVersion }}
kind: {{ $kind }}
metadata:
  name: {{ include "mcp-server.fullname" $root | quote }}
  namespace: {{ $root.Release.Namespace | quote }}
  labels:
    {{- merge (include "mcp-server.labels" $root | fromYaml) ($values.labels | default dict) | toYaml | nindent 4 }}
  {{- include "mcp-server.annotations" (list $root dict) }}
spec:
  selector:
    matchLabels:
      {{- include (index . 5) $root | nindent 6 }}
  {{- if hasPrefix "azmonitoring." $values.apiVersion }}
  # The most that Azure Monitor keeps.
  labelLimit: 63
  labelNameLengthLimit: 511
  labelValueLengthLimit: 1023
  {{- end }}
  {{ index . 4 }}:
    - port: metrics
      path: /metrics
      interval: {{ $values.interval | quote }}
      scrapeTimeout: {{ $values.scrapeTimeout | quote }}
{{- end }}
{{- end -}}
