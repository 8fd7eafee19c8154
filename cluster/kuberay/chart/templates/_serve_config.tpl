{{/*
The Serve config file as it is deployed: that of `serve.config`, or serve/fleet.yaml, with `serve.args` put into the
args of its applications, and the file of API keys into those of gateways where there is one.
*/}}
{{- define "flux-ray.serveConfig" -}}
{{- $text := .Values.serve.config | default (.Files.Get "files/fleet.yaml") -}}
{{- $config := fromYaml $text -}}
{{- if or (hasKey $config "Error") (not (kindIs "slice" $config.applications)) -}}
{{- fail (printf "serve.config is no Serve config file: %s" ($config.Error | default "it has no list of `applications`")) -}}
{{- end -}}
{{- $names := list -}}
{{- range $application := $config.applications -}}
{{- $names = append $names $application.name -}}
{{- $args := $application.args | default dict -}}
{{- if and (eq $application.import_path "flux_ray.app:build_gateway") (include "flux-ray.secretName" (dict "root" $ "of" "keys")) -}}
{{- $_ := set $args "keys_file" "/etc/flux-ray/keys/keys.yaml" -}}
{{- end -}}
{{- range $key, $value := index $.Values.serve.args $application.name -}}
{{- $_ := set $args $key $value -}}
{{- end -}}
{{- $_ := set $application "args" $args -}}
{{- end -}}
{{- range $name, $_ := .Values.serve.args -}}
{{- if not (has $name $names) -}}
{{- fail (printf "serve.args.%s: the Serve config file has no application of that name, only %s" $name (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}
