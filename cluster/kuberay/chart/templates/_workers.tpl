{{/* One group of whole nodes. Takes a dict of `root` and `group`, which is complete. */}}
{{- define "flux-ray.workers" -}}
{{- $root := .root -}}
{{- with .group -}}
groupName: {{ .name }}
replicas: {{ int .replicas }}
minReplicas: {{ int (ternary .minReplicas .replicas (hasKey . "minReplicas")) }}
maxReplicas: {{ int (.maxReplicas | default .replicas) }}
rayStartParams:
  # Else a third of the memory.
  object-store-memory: {{ int64 .objectStoreMemoryBytes | quote }}
{{- with .labels }}
# Labels of the Pods, and of Ray's nodes for `node_labels` of tiers.
labels:
  {{- toYaml . | nindent 2 }}
{{- end }}
template:
  metadata:
    labels:
      {{- include "flux-ray.podLabels" (dict "root" $root "component" "worker") | nindent 6 }}
      flux-ray/group: {{ .name }}
  spec:
    automountServiceAccountToken: false
    # All of preStop is in it: see terminationGracePeriodSeconds in values.yaml.
    terminationGracePeriodSeconds: {{ int .terminationGracePeriodSeconds }}
    {{- with .runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- with $root.Values.image.pullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "flux-ray.podSecurity" $root | nindent 6 }}
    {{- with .nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- if $root.Values.weights.initContainer }}
    initContainers:
      - {{- include "flux-ray.pullContainer" $root | nindent 8 }}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "flux-ray.image" $root }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        env:
          {{- include "flux-ray.env" (dict "root" $root "component" "worker") | nindent 10 }}
        ports:
          - { name: serve, containerPort: 8000 }
          - { name: metrics, containerPort: 8080 }
        {{- include "flux-ray.liveness" $root | nindent 8 }}
        # The proxy's own word, which is no as soon as the node is drained; the operator's probe would need wget in
        # the image. A Pod without a replica has no proxy and is never ready, which is as it should be.
        readinessProbe:
          httpGet: { path: /-/healthz, port: serve }
          initialDelaySeconds: 10
          periodSeconds: 3
          timeoutSeconds: 3
          failureThreshold: 2
        lifecycle:
          # Not `ray stop`, which would end what is being generated. The script tells Ray that this node goes away
          # and returns when its replicas have left; only then does the container hear of the end.
          preStop:
            exec:
              command: [bash, /etc/flux-ray/scripts/drain_node.sh, {{ sub (int .terminationGracePeriodSeconds) (int $root.Values.drain.marginSeconds) | quote }}]
        resources:
          # The operator tells Ray these numbers. No limit of CPUs: loading and decoding may take what is idle.
          requests:
            cpu: {{ .cpu | quote }}
            memory: {{ .memory }}
            {{- if .gpusPerNode }}
            nvidia.com/gpu: {{ int .gpusPerNode }}
            {{- end }}
          limits:
            memory: {{ .memory }}
            {{- if .gpusPerNode }}
            nvidia.com/gpu: {{ int .gpusPerNode }}
            {{- end }}
        securityContext:
          {{- include "flux-ray.containerSecurity" $root | nindent 10 }}
        volumeMounts:
          - { name: shared-memory, mountPath: /dev/shm }
          - { name: weights, mountPath: {{ $root.Values.weights.mountPath }} }
          - { name: scripts, mountPath: /etc/flux-ray/scripts, readOnly: true }
          {{- if include "flux-ray.secretName" (dict "root" $root "of" "keys") }}
          # The folder, not the file: only then do changes arrive.
          - { name: keys, mountPath: /etc/flux-ray/keys, readOnly: true }
          {{- end }}
          {{- if include "flux-ray.secretName" (dict "root" $root "of" "upsampler") }}
          - { name: upsampler, mountPath: /etc/flux-ray/upsampler, readOnly: true }
          {{- end }}
    volumes:
      {{- include "flux-ray.sharedMemory" .sharedMemory | nindent 6 }}
      {{- include "flux-ray.weightsVolumes" $root | nindent 6 }}
      - name: scripts
        configMap: { name: {{ $root.Release.Name }}-files, items: [{ key: drain_node.sh, path: drain_node.sh }] }
      {{- with include "flux-ray.secretName" (dict "root" $root "of" "keys") }}
      - name: keys
        secret: { secretName: {{ . }} }
      {{- end }}
      {{- with include "flux-ray.secretName" (dict "root" $root "of" "upsampler") }}
      - name: upsampler
        secret: { secretName: {{ . }} }
      {{- end }}
{{- end }}
{{- end }}
