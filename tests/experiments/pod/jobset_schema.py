"""What Kubernetes takes of a JobSet, as a JSON schema: the part of it that a training job may use.

From the types of kubernetes-sigs/jobset (api/jobset/v1alpha2/jobset_types.go) and of Kubernetes 1.33 (batch/v1 JobSpec,
core/v1 PodSpec and below). Every object is closed: a field that is not written down here is refused, as the API server
refuses unknown fields (kubectl's --validate=strict). Fields of Kubernetes that a training job has no use for are left
out, so that a manifest with one of them has to add it here after a look at its type.
"""

from __future__ import annotations


def _object(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(of: dict, **more) -> dict:
    return {"type": "array", "items": of, **more}


def _enum(*values: str) -> dict:
    return {"enum": list(values)}


TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}  # int32
SECONDS = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # labels, annotations: of text, never numbers
# RFC 1123 and, for a replicated job's name, a part of its pods' host names.
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
# resource.Quantity: what pods ask for.
QUANTITIES = {
    "type": "object",
    "additionalProperties": {
        "type": ["integer", "string"],
        "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i?|m|k)?$",
    },
}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
METADATA = _object(name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)

ENVIRONMENT = _object("name", name={"type": "string", "pattern": r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"}, value=TEXT)
CONTAINER = _object(
    "name image",
    name=NAME,
    image={"type": "string", "minLength": 1},
    imagePullPolicy=_enum("Always", "Never", "IfNotPresent"),
    command=_list(TEXT),
    args=_list(TEXT),
    workingDir=TEXT,
    env=_list(ENVIRONMENT),
    ports=_list(
        _object("containerPort", containerPort=PORT, name=NAME, protocol=_enum("TCP", "UDP", "SCTP"))
    ),
    resources=_object(requests=QUANTITIES, limits=QUANTITIES),
    securityContext=_object(privileged=FLAG),
    volumeMounts=_list(_object("name mountPath", name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
# One source a volume.
VOLUME = _object(
    "name",
    name=NAME,
    csi=_object("driver", driver=TEXT, readOnly=FLAG, fsType=TEXT, volumeAttributes=TEXTS),
    emptyDir=_object(medium=_enum("", "Memory"), sizeLimit=TEXT),
) | {"minProperties": 2, "maxProperties": 2}
TOLERATION = _object(
    key=TEXT,
    operator=_enum("Exists", "Equal"),
    value=TEXT,
    effect=_enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD = _object(
    "containers",
    containers=_list(CONTAINER, minItems=1),
    restartPolicy=_enum("OnFailure", "Never"),  # a Job's pods take no other
    terminationGracePeriodSeconds=SECONDS,
    nodeSelector=TEXTS,
    tolerations=_list(TOLERATION),
    serviceAccountName=NAME,
    priorityClassName=NAME,
    hostNetwork=FLAG,
    dnsPolicy=_enum("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    volumes=_list(VOLUME),
)
JOB = _object(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=_enum("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    ttlSecondsAfterFinished=COUNT,
    template=_object("spec", metadata=METADATA, spec=POD),
)
FAILURE_RULE = _object(
    "name action",
    name={"type": "string", "pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=_enum(
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ),
    onJobFailureReasons=_list(TEXT, uniqueItems=True),
    targetReplicatedJobs=_list(NAME),
)
REPLICATED_JOB = _object(
    "name template",
    name=NAME,
    groupName=TEXT,
    replicas=COUNT,
    template=_object("spec", metadata=METADATA, spec=JOB),
)
JOBSET = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA | {"required": ["name"]},
    spec=_object(
        "replicatedJobs",
        replicatedJobs=_list(REPLICATED_JOB, minItems=1),
        failurePolicy=_object(
            maxRestarts=COUNT,
            restartStrategy=_enum("Recreate", "BlockingRecreate", "InPlaceRestart"),
            rules=_list(FAILURE_RULE),
        ),
        successPolicy=_object("operator", operator=_enum("All", "Any"), targetReplicatedJobs=_list(NAME)),
        network=_object(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
)
