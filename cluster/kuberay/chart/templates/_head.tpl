{{/* The head: Ray's and Serve's control, the dashboard, and no work. */}}
{{- define "flux-ray.head" -}}
rayStartParams:
  # Neither gateways nor the ledger, nor any tier, are placed where there are no CPUs.
  num-cpus: "0"
  object-store-memory: {{ int64 .Values.head.objectStoreMemoryBytes | quote }}
{{- with .Values.head.labels }}
labels:
  {{- toYaml . | nindent 2 }}
{{- end }}
template:
  metadata:
    labels:
      {{- include "flux-ray.podLabels" (dict "root" . "component" "head") | nindent 6 }}
  spec:
    automountServiceAccountToken: {{ .Values.autoscaler.enabled }}
    {{- with .Values.image.pullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "flux-ray.podSecurity" . | nindent 6 }}
    {{- with .Values.head.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .Values.head.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: ray-head
        image: {{ include "flux-ray.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        env:
          {{- include "flux-ray.env" (dict "root" . "component" "head") | nindent 10 }}
        # The operator knows them by these names; without one named `serve` it makes no Service. 44217 and 44227
        # are fixed in Ray: what its autoscaler and its dashboard measure.
        ports:
          - { name: gcs-server, containerPort: 6379 }
          - { name: dashboard, containerPort: 8265 }
          - { name: serve, containerPort: 8000 }
          - { name: metrics, containerPort: 8080 }
          - { name: as-metrics, containerPort: 44217 }
          - { name: dash-metrics, containerPort: 44227 }
        {{- include "flux-ray.liveness" . | nindent 8 }}
        readinessProbe:
          httpGet: { path: /api/healthz, port: 52365 }
          initialDelaySeconds: 10
          periodSeconds: 5
          timeoutSeconds: 5
          failureThreshold: 10
        resources:
          requests: { cpu: {{ .Values.head.cpu | quote }}, memory: {{ .Values.head.memory }} }
          limits: { memory: {{ .Values.head.memory }} }
        securityContext:
          {{- include "flux-ray.containerSecurity" . | nindent 10 }}
        volumeMounts:
          - { name: shared-memory, mountPath: /dev/shm }
    volumes:
      {{- include "flux-ray.sharedMemory" "2Gi" | nindent 6 }}
{{- end }}
