#!/usr/bin/env bash
# The preStop of a worker Pod: drain_node.sh SECONDS. It tells Ray that this node is gone after so many seconds, and
# returns when Serve has taken its replicas and its proxy away, or they have passed. Serve starts replacements
# elsewhere first, as long as there is time for both; what is being generated here is finished.
set -u
notice_s=$1
# Tests have these of their own.
proc=${PROC:-/proc}
every_s=${EVERY_S:-1}
patience_s=${PATIENCE_S:-$((notice_s / 2 < 120 ? notice_s / 2 : 120))}

# How processes call themselves, a line each; Ray writes it over their command line.
titles() {
  cat "$proc"/[0-9]*/cmdline 2> /dev/null | tr '\0' '\n'
}

node_id=$(titles | sed -n 's/^--node_id=//p' | head -n 1)
if [ -z "$node_id" ]; then
  echo "there is no raylet: nothing to drain" >&2
  exit 0
fi

# Whether the head's port can be reached, which costs no process of Ray's.
is_head_there() {
  timeout 5 bash -c "exec 3<> /dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS##*:}" 2> /dev/null
}

# A head that restarts is back within two minutes. One that is gone was deleted with the cluster: nobody takes over,
# and to wait would only keep the cards from the next cluster.
heard_s=0
end_without_head() {
  if is_head_there; then
    heard_s=$SECONDS
  elif [ "$((SECONDS - heard_s))" -ge "$patience_s" ]; then
    echo "the head is gone: not waiting after $SECONDS s" >&2
    exit 0
  fi
}

until timeout 30 ray drain-node --address "$RAY_ADDRESS" --node-id "$node_id" \
  --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "Kubernetes ends this Pod" \
  --deadline-remaining-seconds "$((notice_s - SECONDS))"; do
  end_without_head
  [ "$SECONDS" -lt "$notice_s" ] || exit 0
  sleep "$every_s"
done

while [ "$SECONDS" -lt "$notice_s" ]; do
  if ! titles | grep -q -e '^ray::ServeReplica:' -e '^ray::ProxyActor'; then
    echo "drained within $SECONDS s"
    exit 0
  fi
  end_without_head
  sleep "$every_s"
done
echo "still busy after $notice_s s" >&2
