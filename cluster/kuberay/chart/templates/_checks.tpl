{{/*
What would render, and then fail or lose requests: said before anything changes. The operator's webhook, where it is
installed at all, and Serve would tell later, or not.
*/}}
{{- define "flux-ray.checks" -}}
{{- if gt (len .Release.Name) 47 -}}
{{- fail (printf "the release's name is %d characters long: a RayService may have 47, for what the operator appends" (len .Release.Name)) -}}
{{- end -}}
{{- $config := include "flux-ray.serveConfig" . | fromYaml -}}
{{- include "flux-ray.checkHttp" (dict "root" . "config" $config) -}}
{{- include "flux-ray.checkAddresses" $config -}}
{{- include "flux-ray.checkEnds" (dict "root" . "config" $config) -}}
{{- include "flux-ray.checkCards" (dict "root" . "config" $config) -}}
{{- include "flux-ray.checkUpgrade" . -}}
{{- if and .Values.weights.job .Values.weights.hostPath -}}
{{- fail "weights.job: it would fill the weights.hostPath of one node only; leave that to weights.initContainer" -}}
{{- end -}}
{{- end }}

{{- define "flux-ray.checkHttp" -}}
{{- $http := .config.http_options | default dict -}}
{{- if ne ($http.host | default "0.0.0.0") "0.0.0.0" -}}
{{- fail (printf "http_options.host of the Serve config file is %s: other Pods reach only 0.0.0.0" $http.host) -}}
{{- end -}}
{{- if ne (int ($http.port | default 8000)) 8000 -}}
{{- fail (printf "http_options.port of the Serve config file is %v: the Service and the probes expect 8000" $http.port) -}}
{{- end -}}
{{- if ne (.config.proxy_location | default "EveryNode") "EveryNode" -}}
{{- fail "proxy_location of the Serve config file must be EveryNode: the head takes no requests" -}}
{{- end -}}
{{- $longest := int ($http.request_timeout_s | default 0) -}}
{{- if le (int .root.Values.upgrade.deletionDelaySeconds) $longest -}}
{{- fail (printf "upgrade.deletionDelaySeconds %v must be more than request_timeout_s %d of the Serve config file: an old cluster would be deleted with requests in it" .root.Values.upgrade.deletionDelaySeconds $longest) -}}
{{- end -}}
{{- end }}

{{/* The gateways refuse such an address too, but only when all Pods are up: `check_addresses` in flux_ray/config/. */}}
{{- define "flux-ray.checkAddresses" -}}
{{- range $application := .applications -}}
{{- $args := $application.args | default dict -}}
{{- $jobs := ternary $args.jobs dict (kindIs "map" $args.jobs) -}}
{{- range $key, $address := dict "public_url" $args.public_url "jobs.database" $jobs.database "jobs.results" $jobs.results -}}
{{- if regexMatch "(?i)^[a-z][a-z0-9+.-]*://([^/?#]*@)?[^/?#@]*\\.invalid(:[0-9]*)?([/?#]|$)" (toString $address) -}}
{{- fail (printf "serve.args.%s.%s: %s only stands for an address of yours: set it" $application.name $key $address) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whoever ends has the time that its drain_timeout_s says: gateways 660 s unless told, tiers no more than that. */}}
{{- define "flux-ray.checkEnds" -}}
{{- $drain := 0 -}}
{{- range $application := .config.applications -}}
{{- $args := $application.args | default dict -}}
{{- $own := ternary 660 0 (eq $application.import_path "flux_ray.app:build_gateway") -}}
{{- $drain = max $drain (int ($args.drain_timeout_s | default $own)) -}}
{{- if and (kindIs "map" $args.jobs) (not (hasPrefix "postgresql://" ($args.jobs.database | default ""))) -}}
{{- fail "serve.args.gateway.jobs: `database` must be postgresql://..., as gateways run in several Pods and a file of one Pod ends with it" -}}
{{- end -}}
{{- end -}}
{{- range $raw := .root.Values.workerGroups -}}
{{- $group := include "flux-ray.group" (dict "root" $.root "group" $raw) | fromYaml -}}
{{- $notice := sub (int $group.terminationGracePeriodSeconds) (int $.root.Values.drain.marginSeconds) -}}
{{- if le $notice 0 -}}
{{- fail (printf "workerGroups %s: terminationGracePeriodSeconds must be more than drain.marginSeconds %v" $group.name $.root.Values.drain.marginSeconds) -}}
{{- end -}}
{{- if and (not $group.isPreemptible) (le $notice $drain) -}}
{{- fail (printf "workerGroups %s: terminationGracePeriodSeconds less drain.marginSeconds is %d and must be more than the longest drain_timeout_s, %d, or Serve stops replicas at once; say isPreemptible: true if there is no more time" $group.name $notice $drain) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* No more cards than there are, and no rank group larger than a Pod. Autoscaled tiers count with their least. */}}
{{- define "flux-ray.checkCards" -}}
{{- $has := 0 -}}
{{- $largest := 0 -}}
{{- $names := list -}}
{{- range $raw := .root.Values.workerGroups -}}
{{- $group := include "flux-ray.group" (dict "root" $.root "group" $raw) | fromYaml -}}
{{- if has $group.name $names -}}
{{- fail (printf "workerGroups: two groups are named %s" $group.name) -}}
{{- end -}}
{{- $names = append $names $group.name -}}
{{- $num := int ($group.maxReplicas | default $group.replicas) -}}
{{- $has = add $has (mul $num (int $group.gpusPerNode)) -}}
{{- $largest = max $largest (int $group.gpusPerNode) -}}
{{- end -}}
{{- $needs := 0 -}}
{{- range $application := .config.applications -}}
{{- $args := $application.args | default dict -}}
{{- if and $args.tier (ne ($args.device | default "cuda") "cpu") -}}
{{- $parallel := $args.parallel | default dict -}}
{{- $ranks := mul (int ($parallel.tensor | default 1)) (int ($parallel.sequence | default 1)) -}}
{{- $nodes := int ($parallel.num_nodes | default 1) -}}
{{- if gt $ranks (mul $nodes $largest) -}}
{{- fail (printf "serve.args.%s.parallel: a replica has %d ranks on %d node(s), and no worker group has more than %d cards a node" $application.name $ranks $nodes $largest) -}}
{{- end -}}
{{- $replicas := int (ternary $args.num_replicas 1 (hasKey $args "num_replicas")) -}}
{{- if $args.autoscaling -}}
{{- $replicas = int (ternary $args.autoscaling.min_replicas 1 (hasKey $args.autoscaling "min_replicas")) -}}
{{- end -}}
{{- $needs = add $needs (mul $ranks $replicas) (ternary 1 0 (eq ($args.text_encoder | default "colocated") "shared")) -}}
{{- end -}}
{{- $slowest := int ($args.load_timeout_s | default 600) -}}
{{- if and $args.tier (le (int $.root.Values.initializingTimeoutSeconds) $slowest) -}}
{{- fail (printf "initializingTimeoutSeconds %v must be more than load_timeout_s %d of %s, or the operator gives up while it loads" $.root.Values.initializingTimeoutSeconds $slowest $application.name) -}}
{{- end -}}
{{- end -}}
{{- if gt $needs $has -}}
{{- fail (printf "the tiers of the Serve config file take %d cards, and workerGroups have %d" $needs $has) -}}
{{- end -}}
{{- end }}

{{- define "flux-ray.checkUpgrade" -}}
{{- with .Values.upgrade -}}
{{- if eq .spareNodes "some" -}}
{{- if not $.Values.autoscaler.enabled -}}
{{- fail "upgrade.spareNodes: some needs autoscaler.enabled: true, which moves the nodes from one cluster to the other" -}}
{{- end -}}
{{- if not .incremental.gatewayClassName -}}
{{- fail "upgrade.spareNodes: some needs upgrade.incremental.gatewayClassName, of the Gateway that splits the traffic" -}}
{{- end -}}
{{- if gt (int .incremental.stepSizePercent) (int .incremental.maxSurgePercent) -}}
{{- fail "upgrade.incremental.stepSizePercent must not be more than maxSurgePercent" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
