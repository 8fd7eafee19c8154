{{/*
The Serve config file as it is deployed: that of `serve.config`, or serve/fleet.yaml, with `serve.args` put into the
args of its applications, and the files of API keys and of the LLM's key into those of gateways where there are some.
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
{{- if and (kindIs "map" $args.upsampling) (include "flux-ray.secretName" (dict "root" $ "of" "upsampler")) -}}
{{- $_ := set $args "upsampling" (merge (dict) $args.upsampling (dict "api_key_file" "/etc/flux-ray/upsampler/key")) -}}
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
