{{/* The RayService has the release's name; what is beside it, that name and a suffix. */}}
{{- define "flux-ray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: flux-ray
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/*
The labels by which everything here finds the Pods. Those of the operator would not do: `ray.io/cluster` is another
one after each upgrade, and `app.kubernetes.io/name` must stay `kuberay`, or its Services find no head.
Takes a dict of `root` and `component` (head, worker, weights).
*/}}
{{- define "flux-ray.podLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: flux-ray
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The Pods of all components: they may talk to each other. */}}
{{- define "flux-ray.allPods" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: flux-ray
{{- end }}

{{- define "flux-ray.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/*
The name of a Secret: one that exists, or the one that secrets.yaml makes of the content; empty if neither was given.
Takes a dict of `root` and `of` (a key of .Values.secrets).
*/}}
{{- define "flux-ray.secretName" -}}
{{- $secret := index .root.Values.secrets .of -}}
{{- $content := omit $secret "existing" | values | join "" -}}
{{- if and $secret.existing $content -}}
{{- fail (printf "secrets.%s: give `existing` or the content, not both" .of) -}}
{{- end -}}
{{- if $secret.existing -}}
{{ $secret.existing }}
{{- else if $content -}}
{{ .root.Release.Name }}-{{ kebabcase .of }}
{{- end -}}
{{- end }}

{{/* One worker group with what it left out, as YAML. Takes a dict of `root` and `group`. */}}
{{- define "flux-ray.group" -}}
{{- $all := deepCopy .root.Values.workerDefaults -}}
{{- range $key, $value := .group -}}
{{- $_ := set $all $key $value -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}
