//! Request bodies in Kubernetes' protobuf form, which the typed creates of `kubectl` send (`create configmap`, `create token`,
//! `auth can-i`, ...).
//!
//! The envelope is `k8s\0` and `runtime.Unknown`. Only the kinds and fields of `TABLE` are read; a field that is not in it is an error,
//! never lost. Answers are always JSON, which those clients accept too.

use std::collections::HashMap;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// The media type.
pub const MEDIA: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
const MAX_DEPTH: usize = 32;

/// A type, then its fields: number, name, form. Forms: `s` text, `i` number, `b` truth (left out when zero), `S` `I` `B` the same where zero
/// is a value, `y` bytes, `t` text list, `m` map of text, `M` map of bytes, `q` map of quantities, `x` int-or-string, `-` ignored (status, times of
/// the server), `T` a message, `[T` a list of messages. Numbers are those of the published `generated.proto` files.
const TABLE: &str = "
ObjectMeta 1 name s 2 generateName s 3 namespace s 4 selfLink - 5 uid s 6 resourceVersion s 7 generation - 8 creationTimestamp - 9 deletionTimestamp - 10 deletionGracePeriodSeconds - 11 labels m 12 annotations m 13 ownerReferences [OwnerReference 14 finalizers t 17 managedFields -
OwnerReference 1 kind s 3 name s 4 uid s 5 apiVersion s 6 controller B 7 blockOwnerDeletion B
ConfigMap 1 metadata ObjectMeta 2 data m 3 binaryData M 4 immutable B
Secret 1 metadata ObjectMeta 2 data M 3 type s 4 stringData m 5 immutable B
Namespace 1 metadata ObjectMeta 2 spec NamespaceSpec 3 status -
NamespaceSpec 1 finalizers t
ServiceAccount 1 metadata ObjectMeta 2 secrets [ObjectReference 3 imagePullSecrets [LocalObjectReference 4 automountServiceAccountToken B
ObjectReference 1 kind s 2 namespace s 3 name s 4 uid s 5 apiVersion s 6 resourceVersion s 7 fieldPath s
LocalObjectReference 1 name s
Service 1 metadata ObjectMeta 2 spec ServiceSpec 3 status -
ServiceSpec 1 ports [ServicePort 2 selector m 3 clusterIP s 4 type s 5 externalIPs t 7 sessionAffinity s 8 loadBalancerIP s 9 loadBalancerSourceRanges t 10 externalName s 11 externalTrafficPolicy s 12 healthCheckNodePort i 13 publishNotReadyAddresses b 17 ipFamilyPolicy S 18 clusterIPs t 19 ipFamilies t 20 allocateLoadBalancerNodePorts B 21 loadBalancerClass S 22 internalTrafficPolicy S 23 trafficDistribution S
ServicePort 1 name s 2 protocol s 3 port i 4 targetPort x 5 nodePort i 6 appProtocol S
Deployment 1 metadata ObjectMeta 2 spec DeploymentSpec 3 status -
DeploymentSpec 1 replicas I 2 selector LabelSelector 3 template PodTemplateSpec 4 strategy DeploymentStrategy 5 minReadySeconds i 6 revisionHistoryLimit I 7 paused b 9 progressDeadlineSeconds I
DeploymentStrategy 1 type s 2 rollingUpdate RollingUpdateDeployment
RollingUpdateDeployment 1 maxUnavailable x 2 maxSurge x
LabelSelector 1 matchLabels m 2 matchExpressions [LabelSelectorRequirement
LabelSelectorRequirement 1 key s 2 operator s 3 values t
PodTemplateSpec 1 metadata ObjectMeta 2 spec PodSpec
PodSpec 2 containers [Container 3 restartPolicy s 4 terminationGracePeriodSeconds I 5 activeDeadlineSeconds I 6 dnsPolicy s 7 nodeSelector m 8 serviceAccountName s 9 serviceAccount s 10 nodeName s 11 hostNetwork b 12 hostPID b 13 hostIPC b 14 securityContext PodSecurityContext 15 imagePullSecrets [LocalObjectReference 16 hostname s 17 subdomain s 19 schedulerName s 20 initContainers [Container 21 automountServiceAccountToken B 24 priorityClassName s 25 priority I 27 shareProcessNamespace B 29 runtimeClassName S 30 enableServiceLinks B 31 preemptionPolicy S
PodSecurityContext 2 runAsUser I 3 runAsNonRoot B 5 fsGroup I 6 runAsGroup I
Job 1 metadata ObjectMeta 2 spec JobSpec 3 status -
JobSpec 1 parallelism I 2 completions I 3 activeDeadlineSeconds I 4 selector LabelSelector 5 manualSelector B 6 template PodTemplateSpec 7 backoffLimit I 8 ttlSecondsAfterFinished I 9 completionMode S 10 suspend B 12 backoffLimitPerIndex I 13 maxFailedIndexes I 14 podReplacementPolicy S 15 managedBy S
JobTemplateSpec 1 metadata ObjectMeta 2 spec JobSpec
CronJob 1 metadata ObjectMeta 2 spec CronJobSpec 3 status -
CronJobSpec 1 schedule s 2 startingDeadlineSeconds I 3 concurrencyPolicy s 4 suspend B 5 jobTemplate JobTemplateSpec 6 successfulJobsHistoryLimit I 7 failedJobsHistoryLimit I 8 timeZone S
PodDisruptionBudget 1 metadata ObjectMeta 2 spec PodDisruptionBudgetSpec 3 status -
PodDisruptionBudgetSpec 1 minAvailable x 2 selector LabelSelector 3 maxUnavailable x 4 unhealthyPodEvictionPolicy S
autoscaling/v1/HorizontalPodAutoscaler 1 metadata ObjectMeta 2 spec autoscaling/v1/HorizontalPodAutoscalerSpec 3 status -
autoscaling/v1/HorizontalPodAutoscalerSpec 1 scaleTargetRef CrossVersionObjectReference 2 minReplicas I 3 maxReplicas i 4 targetCPUUtilizationPercentage I
autoscaling/v2/HorizontalPodAutoscaler 1 metadata ObjectMeta 2 spec autoscaling/v2/HorizontalPodAutoscalerSpec 3 status -
autoscaling/v2/HorizontalPodAutoscalerSpec 1 scaleTargetRef CrossVersionObjectReference 2 minReplicas I 3 maxReplicas i 4 metrics [MetricSpec
CrossVersionObjectReference 1 kind s 2 name s 3 apiVersion s
MetricSpec 1 type s 4 resource ResourceMetricSource
ResourceMetricSource 1 name s 2 target MetricTarget
MetricTarget 1 type s 4 averageUtilization I
Container 1 name s 2 image s 3 command t 4 args t 5 workingDir s 6 ports [ContainerPort 7 env [EnvVar 8 resources ResourceRequirements 13 terminationMessagePath s 14 imagePullPolicy s 16 stdin b 17 stdinOnce b 18 tty b 20 terminationMessagePolicy s
ContainerPort 1 name s 2 hostPort i 3 containerPort i 4 protocol s 5 hostIP s
EnvVar 1 name s 2 value s
ResourceRequirements 1 limits q 2 requests q
TokenRequest 1 metadata ObjectMeta 2 spec TokenRequestSpec 3 status -
TokenRequestSpec 1 audiences t 3 boundObjectRef BoundObjectReference 4 expirationSeconds I
BoundObjectReference 1 kind s 2 apiVersion s 3 name s 4 uid s
TokenReview 1 metadata ObjectMeta 2 spec TokenReviewSpec 3 status -
TokenReviewSpec 1 token s 2 audiences t
SelfSubjectReview 1 metadata ObjectMeta 2 status -
SelfSubjectAccessReview 1 metadata ObjectMeta 2 spec SelfSubjectAccessReviewSpec 3 status -
SelfSubjectAccessReviewSpec 1 resourceAttributes ResourceAttributes 2 nonResourceAttributes NonResourceAttributes
SelfSubjectRulesReview 1 metadata ObjectMeta 2 spec SelfSubjectRulesReviewSpec 3 status -
SelfSubjectRulesReviewSpec 1 namespace s
ResourceAttributes 1 namespace s 2 verb s 3 group s 4 version s 5 resource s 6 subresource s 7 name s 8 fieldSelector - 9 labelSelector -
NonResourceAttributes 1 path s 2 verb s
SubjectAccessReview 1 metadata ObjectMeta 2 spec SubjectAccessReviewSpec 3 status -
LocalSubjectAccessReview 1 metadata ObjectMeta 2 spec SubjectAccessReviewSpec 3 status -
SubjectAccessReviewSpec 1 resourceAttributes ResourceAttributes 2 nonResourceAttributes NonResourceAttributes 3 user s 4 groups t 6 uid s
PolicyRule 1 verbs t 2 apiGroups t 3 resources t 4 resourceNames t 5 nonResourceURLs t
AggregationRule 1 clusterRoleSelectors [LabelSelector
Role 1 metadata ObjectMeta 2 rules [PolicyRule
ClusterRole 1 metadata ObjectMeta 2 rules [PolicyRule 3 aggregationRule AggregationRule
Subject 1 kind s 2 apiGroup s 3 name s 4 namespace s
RoleRef 1 apiGroup s 2 kind s 3 name s
RoleBinding 1 metadata ObjectMeta 2 subjects [Subject 3 roleRef RoleRef
ClusterRoleBinding 1 metadata ObjectMeta 2 subjects [Subject 3 roleRef RoleRef
Eviction 1 metadata ObjectMeta 2 deleteOptions DeleteOptions
DeleteOptions 1 gracePeriodSeconds I 2 preconditions Preconditions 3 orphanDependents B 4 propagationPolicy S 5 dryRun t 6 ignoreStoreReadErrorWithClusterBreakingPotential -
Preconditions 1 uid S 2 resourceVersion S
CertificateSigningRequest 1 metadata ObjectMeta 2 spec CertificateSigningRequestSpec 3 status CertificateSigningRequestStatus
CertificateSigningRequestSpec 1 request y 2 username s 3 uid s 4 groups t 5 usages t 6 extra - 7 signerName s 8 expirationSeconds I
CertificateSigningRequestStatus 1 conditions [CertificateSigningRequestCondition 2 certificate y
CertificateSigningRequestCondition 1 type s 2 reason s 3 message s 4 lastUpdateTime - 5 lastTransitionTime - 6 status s
";

type Fields = HashMap<u64, (&'static str, &'static str)>;

fn types() -> &'static HashMap<&'static str, Fields> {
    static TYPES: OnceLock<HashMap<&'static str, Fields>> = OnceLock::new();
    TYPES.get_or_init(|| {
        let lines = TABLE.lines().filter(|line| !line.is_empty());
        lines
            .filter_map(|line| {
                let (name, fields) = line.split_once(' ')?;
                let words: Vec<&str> = fields.split(' ').collect();
                let fields = words
                    .chunks_exact(3)
                    .filter_map(|w| Some((w[0].parse().ok()?, (w[1], w[2]))));
                Some((name, fields.collect()))
            })
            .collect()
    })
}

/// One field of a message on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// A body as the JSON that it stands for.
///
/// # Errors
/// What is wrong or not known, for the client.
pub fn decode(body: &[u8]) -> Result<Value, String> {
    let envelope = body
        .strip_prefix(MAGIC)
        .ok_or("the body does not begin like Kubernetes protobuf")?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for (number, wire) in fields(envelope)? {
        match (number, wire) {
            (1, Wire::Bytes(meta)) => {
                for (number, wire) in fields(meta)? {
                    match (number, wire) {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    // A kind with two versions has a name for each.
    let versioned = format!("{api_version}/{kind}");
    let name = if types().contains_key(versioned.as_str()) {
        &versioned
    } else {
        &kind
    };
    let mut object = message(name, raw, 0)?;
    object["apiVersion"] = api_version.into();
    object["kind"] = kind.into();
    Ok(object)
}

fn message(name: &str, bytes: &[u8], depth: usize) -> Result<Value, String> {
    let known = types()
        .get(name)
        .ok_or_else(|| format!("protobuf is not read for kind {name:?}; send JSON"))?;
    if depth == MAX_DEPTH {
        return Err("the protobuf message is nested too deeply".to_owned());
    }
    let mut out = Map::new();
    for (number, wire) in fields(bytes)? {
        let Some((field, form)) = known.get(&number) else {
            return Err(format!(
                "field {number} of {name} is not read from protobuf; send JSON"
            ));
        };
        let wrong = || format!("field {field} of {name} has the wrong form");
        match (*form, wire) {
            ("-", _) => {}
            ("s" | "y", Wire::Bytes([])) | ("i" | "b", Wire::Number(0)) => {}
            ("s" | "S", Wire::Bytes(text)) => set(&mut out, field, utf8(text)?.into()),
            ("y", Wire::Bytes(bytes)) => set(&mut out, field, STANDARD.encode(bytes).into()),
            // Numbers are two's complement, as protobuf has it for int32 and int64.
            ("i" | "I", Wire::Number(n)) => set(&mut out, field, n.cast_signed().into()),
            ("b" | "B", Wire::Number(n)) => set(&mut out, field, (n != 0).into()),
            ("t", Wire::Bytes(text)) => push(&mut out, field, utf8(text)?.into()),
            ("m" | "M" | "q", Wire::Bytes(entry)) => {
                let (key, value) = map_entry(form, entry)?;
                let map = out.entry(*field).or_insert_with(|| json!({}));
                map[key.as_str()] = value;
            }
            ("x", Wire::Bytes(inner)) => set(&mut out, field, int_or_string(inner)?),
            (form, Wire::Bytes(inner)) => match form.strip_prefix('[') {
                Some(item) => push(&mut out, field, message(item, inner, depth + 1)?),
                None => set(&mut out, field, message(form, inner, depth + 1)?),
            },
            _ => return Err(wrong()),
        }
    }
    Ok(Value::Object(out))
}

fn set(out: &mut Map<String, Value>, field: &str, value: Value) {
    out.insert(field.to_owned(), value);
}

fn push(out: &mut Map<String, Value>, field: &str, value: Value) {
    if let Value::Array(list) = out.entry(field).or_insert_with(|| json!([])) {
        list.push(value);
    }
}

fn map_entry(form: &str, bytes: &[u8]) -> Result<(String, Value), String> {
    let (mut key, mut value) = (String::new(), &[][..]);
    for (number, wire) in fields(bytes)? {
        match (number, wire) {
            (1, Wire::Bytes(text)) => key = utf8(text)?,
            (2, Wire::Bytes(inner)) => value = inner,
            _ => {}
        }
    }
    let value = match form {
        "M" => STANDARD.encode(value),
        // A quantity is a message with its text.
        "q" => match fields(value)?.into_iter().find_map(|(_, w)| {
            if let Wire::Bytes(b) = w {
                Some(b)
            } else {
                None
            }
        }) {
            Some(text) => utf8(text)?,
            None => "0".to_owned(),
        },
        _ => utf8(value)?,
    };
    Ok((key, value.into()))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, String> {
    let (mut text_form, mut number, mut text) = (false, 0, String::new());
    for (field, wire) in fields(bytes)? {
        match (field, wire) {
            (1, Wire::Number(kind)) => text_form = kind == 1,
            (2, Wire::Number(n)) => number = n.cast_signed(),
            (3, Wire::Bytes(bytes)) => text = utf8(bytes)?,
            _ => {}
        }
    }
    Ok(if text_form {
        text.into()
    } else {
        number.into()
    })
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a protobuf text is not UTF-8".to_owned())
}

fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Wire<'_>)>, String> {
    let short = || "the protobuf message ends too early".to_owned();
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes).ok_or_else(short)?;
        let wire = match tag & 7 {
            0 => Wire::Number(varint(&mut bytes).ok_or_else(short)?),
            2 => {
                let length = varint(&mut bytes)
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(short)?;
                let (inner, rest) = bytes.split_at_checked(length).ok_or_else(short)?;
                bytes = rest;
                Wire::Bytes(inner)
            }
            other => {
                return Err(format!(
                    "protobuf wire type {other} is not used by Kubernetes"
                ));
            }
        };
        all.push((tag >> 3, wire));
    }
    Ok(all)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_field(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, inner.len() as u8];
        out.extend_from_slice(inner);
        out
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [bytes_field(1, b"v1"), bytes_field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes_field(1, &meta), bytes_field(2, raw)].concat()
    }

    #[test]
    fn a_config_map() {
        let metadata = [
            bytes_field(1, b"c"),
            bytes_field(2, b""),
            bytes_field(8, b""),
        ]
        .concat();
        let entry = [bytes_field(1, b"k"), bytes_field(2, b"v")].concat();
        let raw = [bytes_field(1, &metadata), bytes_field(2, &entry)].concat();
        let object = decode(&envelope("ConfigMap", &raw)).unwrap();
        assert_eq!(
            object,
            json!({ "metadata": { "name": "c" }, "data": { "k": "v" }, "apiVersion": "v1", "kind": "ConfigMap" })
        );
    }

    #[test]
    fn a_kind_of_two_versions_is_read_by_its_version() {
        let spec = [
            bytes_field(1, &bytes_field(2, b"web")),
            vec![3 << 3, 4],
            vec![4 << 3, 80],
        ]
        .concat();
        let raw = bytes_field(2, &spec);
        let of = |version: &[u8]| {
            let meta = [
                bytes_field(1, version),
                bytes_field(2, b"HorizontalPodAutoscaler"),
            ]
            .concat();
            decode(&[MAGIC.to_vec(), bytes_field(1, &meta), bytes_field(2, &raw)].concat())
        };
        let old = of(b"autoscaling/v1").unwrap();
        assert_eq!(
            old["spec"],
            json!({ "scaleTargetRef": { "name": "web" }, "maxReplicas": 4, "targetCPUUtilizationPercentage": 80 })
        );
        assert!(
            of(b"autoscaling/v2").is_err(),
            "its field 4 is a list of metrics"
        );
    }

    #[test]
    fn nothing_is_lost_or_trusted() {
        assert!(decode(b"junk").is_err());
        assert!(
            decode(&envelope("ConfigMap", &bytes_field(9, b"x")))
                .unwrap_err()
                .contains("field 9 of ConfigMap")
        );
        assert!(
            decode(&envelope("Strange", b""))
                .unwrap_err()
                .contains("Strange")
        );
        let good = envelope("ConfigMap", &bytes_field(1, &bytes_field(1, b"name")));
        for end in 0..good.len() {
            let _ = decode(&good[..end]);
        }
        assert!(decode(&envelope("ConfigMap", &[0xff; 20])).is_err());
    }

    #[test]
    fn the_table_names_only_known_types() {
        for fields in types().values() {
            for (_, form) in fields.values() {
                let inner = form.trim_start_matches('[');
                assert!(
                    inner.len() == 1 || types().contains_key(inner),
                    "unknown type {inner}"
                );
            }
        }
    }
}
