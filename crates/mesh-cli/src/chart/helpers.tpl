{{/* What is asked for: the profile, and the values of the release over it. */}}
{{- define "mesh.values" -}}
{{- $profile := .Values.profile | default "default" -}}
{{- $text := .Files.Get (printf "files/profile-%s.yaml" $profile) -}}
{{- if not $text }}{{ fail (printf "there is no profile %q; there are default, demo, minimal, openshift, preview and remote" $profile) }}{{ end -}}
{{- mergeOverwrite ($text | fromYaml) (deepCopy .Values) | toJson -}}
{{- end -}}

{{/* An image of its name, hubs and tags, the first that is given; a name with a registry or a tag stands for itself. */}}
{{- define "mesh.image" -}}
{{- $name := .name | default "mesh" -}}
{{- if or (contains "/" $name) (contains ":" $name) -}}
{{ $name }}
{{- else -}}
{{- $hub := coalesce .hub .global.hub -}}
{{- $tag := coalesce .tag .global.tag .version -}}
{{- if $hub }}{{ $hub }}/{{ end }}{{ $name }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{/* The ConfigMap istio's key mesh, as JSON. */}}
{{- define "mesh.config" -}}
{{- $v := .values -}}
{{- $discovery := printf "istiod%s.%s.svc:15012" .suffix .namespace -}}
{{- $mesh := dict "rootNamespace" .namespace "trustDomain" "cluster.local" "defaultConfig" (dict "discoveryAddress" $discovery) -}}
{{- mergeOverwrite $mesh (deepCopy ($v.meshConfig | default dict)) | toJson -}}
{{- end -}}

{{/* The injector's keys config and values, as JSON. */}}
{{- define "mesh.injector.config" -}}
{{- $hook := .values.sidecarInjectorWebhook | default dict -}}
{{- $proxy := .values.global.proxy | default dict -}}
{{- $config := dict "policy" (eq ($proxy.autoInject | default "enabled") "disabled" | ternary "disabled" "enabled") -}}
{{- $_ := set $config "alwaysInjectSelector" ($hook.alwaysInjectSelector | default list) -}}
{{- $_ := set $config "neverInjectSelector" ($hook.neverInjectSelector | default list) -}}
{{- $_ := set $config "injectedAnnotations" ($hook.injectedAnnotations | default dict) -}}
{{- range $key := list "templates" "defaultTemplates" "aliases" -}}
{{- if hasKey $hook $key }}{{ $_ := set $config $key (get $hook $key) }}{{ end -}}
{{- end -}}
{{- $config | toJson -}}
{{- end -}}

{{- define "mesh.injector.values" -}}
{{- $global := .values.global -}}
{{- $ours := dict -}}
{{- range $key := list "imagePullPolicy" "imagePullSecrets" "logging" "multiCluster" "proxy_init" -}}
{{- if hasKey $global $key }}{{ $_ := set $ours $key (get $global $key) }}{{ end -}}
{{- end -}}
{{- $proxy := omit ($global.proxy | default dict) "autoInject" -}}
{{- $image := include "mesh.image" (dict "name" $proxy.image "global" $global "version" .version) -}}
{{- $_ := set $ours "proxy" (merge (dict "image" $image) $proxy) -}}
{{- $values := dict "global" $ours -}}
{{- $hook := .values.sidecarInjectorWebhook | default dict -}}
{{- if hasKey $hook "rewriteAppHTTPProbe" -}}
{{- $_ := set $values "sidecarInjectorWebhook" (dict "rewriteAppHTTPProbe" $hook.rewriteAppHTTPProbe) -}}
{{- end -}}
{{- $values | toJson -}}
{{- end -}}

{{/* The level of logs, of values such as default:debug. */}}
{{- define "mesh.level" -}}
{{- $level := trimPrefix "default:" . -}}
{{- get (dict "warning" "warn" "none" "off" "fatal" "error") $level | default $level -}}
{{- end -}}
