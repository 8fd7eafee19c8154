{{/*
The environment of Ray on head and workers. The first block is what `make serve` sets, with its reasons there and in
docs/serving.md; a test holds them equal. RAY_AUTH_MODE comes from the operator (authOptions).
Takes a dict of `root` and `component`.
*/}}
{{- define "flux-ray.env" -}}
- { name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0" }
- { name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, value: "0" }
- { name: RAY_SERVE_PROXY_USE_GRPC, value: "1" }
- { name: RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, value: "268435456" }
- { name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "flux_ray.gateway.proxy:read_with_h11" }
- { name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, value: "1" }
- { name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "0.25" }
- { name: RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S, value: "3" }
- { name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "60" }
- { name: RAY_health_check_period_ms, value: "1000" }
- { name: MALLOC_ARENA_MAX, value: "1" }
- { name: FORWARDED_ALLOW_IPS, value: {{ .root.Values.trustedProxies | quote }} }
# At SIGTERM Ray drains its node once more, which would take 30 seconds: a worker is drained already by its preStop,
# and on a head there is nothing to drain.
- { name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ ternary "0" "5" (eq .component "head") | quote }} }
{{- with .root.Values.monitoring }}
{{- if eq $.component "head" }}
{{- if .grafanaHost }}
- { name: RAY_GRAFANA_HOST, value: {{ .grafanaHost | quote }} }
- { name: RAY_GRAFANA_IFRAME_HOST, value: {{ .grafanaIframeHost | default .grafanaHost | quote }} }
# Ray's page of Serve shows our panels instead of its own.
- { name: RAY_GRAFANA_SERVE_DASHBOARD_UID, value: flux-ray }
{{- end }}
{{- if .prometheusHost }}
- { name: RAY_PROMETHEUS_HOST, value: {{ .prometheusHost | quote }} }
{{- end }}
{{- end }}
{{- end }}
{{- if eq .component "worker" }}
{{ include "flux-ray.weightsEnv" .root }}
{{- with include "flux-ray.secretName" (dict "root" .root "of" "database") }}
- { name: PGPASSWORD, valueFrom: { secretKeyRef: { name: {{ . }}, key: password } } }
{{- end }}
{{- with include "flux-ray.secretName" (dict "root" .root "of" "objectStore") }}
- { name: AWS_ACCESS_KEY_ID, valueFrom: { secretKeyRef: { name: {{ . }}, key: access-key-id } } }
- { name: AWS_SECRET_ACCESS_KEY, valueFrom: { secretKeyRef: { name: {{ . }}, key: secret-access-key } } }
{{- end }}
{{- end }}
{{- with .root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Where weights are, and how to get gated ones: of workers, their init container and the Job. */}}
{{- define "flux-ray.weightsEnv" -}}
- { name: HF_HOME, value: {{ .Values.weights.mountPath | quote }} }
{{- with .Values.weights.endpoint }}
- { name: HF_ENDPOINT, value: {{ . | quote }} }
{{- end }}
{{- with include "flux-ray.secretName" (dict "root" . "of" "huggingFace") }}
- { name: HF_TOKEN, valueFrom: { secretKeyRef: { name: {{ . }}, key: token } } }
{{- end }}
{{- end }}

{{/* Of the Pods: the image's user, whose group may write to the weights. */}}
{{- define "flux-ray.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
# The weights are many files: do not go through them at every start.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "flux-ray.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: { drop: [ALL] }
{{- end }}

{{/* The container that gets the weights, in worker Pods and in the Job. */}}
{{- define "flux-ray.pullContainer" -}}
name: pull-weights
image: {{ include "flux-ray.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command:
  - flux-ray
  - weights
  - pull
  - /etc/flux-ray/serve/serve.yaml
  {{- if .Values.weights.acceptLicences }}
  - --accept-licence
  {{- end }}
env:
  {{- include "flux-ray.weightsEnv" . | nindent 2 }}
resources:
  requests: { cpu: "2", memory: 4Gi }
  limits: { memory: 4Gi }
securityContext:
  {{- include "flux-ray.containerSecurity" . | nindent 2 }}
volumeMounts:
  - { name: weights, mountPath: {{ .Values.weights.mountPath }} }
  - { name: serve-config, mountPath: /etc/flux-ray/serve, readOnly: true }
{{- end }}

{{- define "flux-ray.weightsVolumes" -}}
- name: weights
  {{- if .Values.weights.hostPath }}
  hostPath: { path: {{ .Values.weights.hostPath }}, type: Directory }
  {{- else }}
  persistentVolumeClaim: { claimName: {{ .Values.weights.claim.existing | default (printf "%s-weights" .Release.Name) }} }
  {{- end }}
# Its name never changes, or each Serve config file would need new Pods.
- name: serve-config
  configMap: { name: {{ .Release.Name }}-files, items: [{ key: serve.yaml, path: serve.yaml }] }
{{- end }}

{{- define "flux-ray.sharedMemory" -}}
- name: shared-memory
  emptyDir: { medium: Memory, sizeLimit: {{ . }} }
{{- end }}

{{/*
Ray's agent knows whether its node, and on the head the GCS, is well; the port asks for no token. The numbers are the
operator's own: ten minutes without an answer, as a head that restarts may take some of them.
*/}}
{{- define "flux-ray.liveness" -}}
livenessProbe:
  httpGet: { path: /api/healthz, port: 52365 }
  initialDelaySeconds: 30
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 120
{{- end }}
