"""Prints a GKE JobSet that runs one command on every machine of a TPU slice, and starts it again when it fails.

    python -m experiments.pod.jobset --name=sft8b --topology=v5e:4x4 --image=us-docker.pkg.dev/p/r/rlhf_jax:1 \\
        --bucket=b -- python -m experiments.sft --workdir=/bucket/sft8b --mesh=fsdp:16 | kubectl apply -f -

With --spot for machines that may be taken back. The command is that of a single machine; where there are several,
--distributed is added to it. It is the container's first process, so that the signal before a preemption reaches it,
ends with status 75 once all is saved (0 would count as done), and resumes where it was when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from experiments.pod import request, slices

NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes namespace.")


def manifest(
    *,
    name: str,
    where: slices.Slice,
    image: str,
    bucket: str,
    command: Sequence[str],
    namespace: str = "default",
    restarts: int = 20,
    spot: bool = False,
    grace_seconds: int = 300,
) -> str:
    """The manifest, as YAML. One job with a pod a machine, none of which restarts alone: a slice lives or dies whole.

    Args:
      name: of the JobSet.
      where: the slice.
      image: of the container.
      bucket: of Cloud Storage, which GKE's driver mounts at ``request.MOUNT``.
      command: what each pod runs, words as they are; no shell reads them.
      namespace: of Kubernetes.
      restarts: of the whole job.
      spot: whether the nodes are spot.
      grace_seconds: between SIGTERM and SIGKILL.

    Raises:
      InputError: a name that Kubernetes or Cloud Storage does not take.
    """
    request.check_name(name)
    request.check_bucket(bucket)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": where.version.accelerator,
        "cloud.google.com/gke-tpu-topology": where.topology,
    } | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    labels = "\n".join(f"{' ' * 16}{key}: {json.dumps(value)}" for key, value in selector.items())
    variable, status = request.UNFINISHED
    words = "\n".join(f"{' ' * 20}- {json.dumps(word)}" for word in command)
    return f"""apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {json.dumps(name)}
  namespace: {json.dumps(namespace)}
  annotations:
    # All pods of the job on one node pool, which is one slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: {where.hosts}
          completions: {where.hosts}
          completionMode: Indexed
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {grace_seconds}
              nodeSelector:
{labels}
              containers:
                - name: worker
                  image: {json.dumps(image)}
                  command:
{words}
                  env:
                    # A job whose pods all end with 0 is done, and not started again.
                    - name: {variable}
                      value: {json.dumps(status)}
                  ports:
                    - containerPort: 8471  # between the machines of a slice
                    - containerPort: 8476  # jax.distributed
                  resources:
                    requests:
                      google.com/tpu: {where.chips_of_a_host}
                    limits:
                      google.com/tpu: {where.chips_of_a_host}
                  volumeMounts:
                    - name: bucket
                      mountPath: {request.MOUNT}
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: {json.dumps(bucket)}
                      mountOptions: {json.dumps(",".join(request.MOUNT_OPTIONS))}
"""


def _text(arguments: Sequence[str]) -> str:
    where = slices.parse(request.TOPOLOGY.value)
    return manifest(
        name=request.NAME.value,
        where=where,
        image=request.IMAGE.value,
        bucket=request.BUCKET.value,
        command=request.command_of(arguments, where),
        namespace=NAMESPACE.value,
        restarts=request.RESTARTS.value,
        spot=request.SPOT.value,
        grace_seconds=request.GRACE.value,
    )


if __name__ == "__main__":
    request.run(_text, needs=(request.IMAGE, request.BUCKET), takes=(request.GRACE,))
