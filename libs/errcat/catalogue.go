package errcat

import (
	"time"

	"google.golang.org/grpc/codes"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Entry is what a reason means in general.
type Entry struct {
	// Code is the gRPC code that errors of the reason travel under.
	Code codes.Code
	// Cause is the likely cause, one or two sentences for an operator.
	Cause string
	// Action is what to do about it, one or two sentences, with the command where there is one.
	Action string
	// Recoverable says that the same call may succeed later without anybody changing anything.
	Recoverable bool
	// RetryAfter is how long a caller should wait before trying again; zero where it should not.
	RetryAfter time.Duration
}

// Lookup returns the catalogue's entry of a reason; false for ERROR_REASON_UNSPECIFIED and for
// numbers that this program does not know.
func Lookup(reason typesv1.ErrorReason) (Entry, bool) {
	e, ok := catalogue[reason]
	return e, ok
}

// catalogue has an entry for every reason of the contract (tested). It is never written to.
var catalogue = map[typesv1.ErrorReason]Entry{
	typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT: {
		Code:   codes.InvalidArgument,
		Cause:  "A value in the command, the file or the request is missing, out of range or malformed.",
		Action: "Correct the fields named above and run the command again.",
	},
	typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED: {
		Code:   codes.Unauthenticated,
		Cause:  "No client certificate was sent, or it does not name a Landfall service or user.",
		Action: "Use a certificate issued by this installation's CA; with `landfall up`, run the CLI as the user who owns the state directory, or name it with --state.",
	},
	typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED: {
		Code:   codes.PermissionDenied,
		Cause:  "The certificate is valid, but its service is not a declared caller of the method, or its user's role is too low.",
		Action: "Ask for a certificate with the role that the message names; between services, check that each program runs with its own certificate.",
	},
	typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED: {
		Code:        codes.DeadlineExceeded,
		Cause:       "The other side is slow or overloaded, the network drops packets, or the time given was too short.",
		Action:      "The outcome is unknown: look at the object's present state (`landfall status`, `landfall jobs`) before repeating the action.",
		Recoverable: true,
		RetryAfter:  time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_CANCELLED: {
		Code:   codes.Canceled,
		Cause:  "The command was interrupted, or the program that asked is shutting down.",
		Action: "Nothing, if it was you; otherwise run the command again.",
	},
	typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE: {
		Code:        codes.Unavailable,
		Cause:       "A service is starting, stopping or unreachable, or its certificate was not accepted.",
		Action:      "Check that the service runs and that address, firewall and certificates are right; Landfall keeps trying by itself.",
		Recoverable: true,
		RetryAfter:  time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_INTERNAL: {
		Code:   codes.Internal,
		Cause:  "A bug in Landfall, or damaged state that no check foresaw.",
		Action: "Keep the logs of the time of the error and report it, with the trace id if there is one; restarting the service is safe.",
	},
	typesv1.ErrorReason_ERROR_REASON_UNIMPLEMENTED: {
		Code:   codes.Unimplemented,
		Cause:  "The server is older than the client, or the feature is not built yet.",
		Action: "Compare `landfall version` on both sides; README.md says what is not built.",
	},
	typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION: {
		Code:        codes.Aborted,
		Cause:       "Two programs or people changed the same record at once.",
		Action:      "Read the record again and repeat the change on its present state.",
		Recoverable: true,
		RetryAfter:  100 * time.Millisecond,
	},
	typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The name or id is misspelt, the VM was deleted on its host, or its host has not registered.",
		Action: "List the VMs with `landfall vms` and the hosts with `landfall hosts`, then use a name that is listed.",
	},
	typesv1.ErrorReason_ERROR_REASON_HOST_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The host name is wrong, or host-provider never ran there.",
		Action: "List the hosts with `landfall hosts`; start host-provider on the host and wait for it to register.",
	},
	typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE: {
		Code:        codes.Unavailable,
		Cause:       "The host is down or restarting, its agent is stopped, or the network between is broken.",
		Action:      "Check the host's power, its Landfall agent and its network; work on the host resumes by itself.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_POLICY_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The policy's name is misspelt, or it was deleted.",
		Action: "List the policies with `landfall policy get`, or create it with `landfall policy apply -f FILE`.",
	},
	typesv1.ErrorReason_ERROR_REASON_JOB_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The job's id is wrong, or the job is older than the history that is kept.",
		Action: "List the jobs with `landfall jobs`.",
	},
	typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The recovery point never committed, or retention removed it.",
		Action: "List the points with `landfall points VM` and choose one of them, or `latest`.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The disk was removed from the VM, or its id is wrong.",
		Action: "Show the VM's disks with `landfall vms show VM`.",
	},
	typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The failover's id is wrong, or it was cleaned up.",
		Action: "List failovers with `landfall failover list`.",
	},
	typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED: {
		Code:   codes.FailedPrecondition,
		Cause:  "Protection was never enabled for the VM, or it was ended.",
		Action: "Enable it with `landfall protect VM --policy POLICY`.",
	},
	typesv1.ErrorReason_ERROR_REASON_INVALID_STATE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The VM, the job or the failover is in a state in which the action is not legal.",
		Action: "Look at the state with `landfall status VM` and `landfall failover list VM`; finish or cancel what is under way, then repeat the action.",
	},
	typesv1.ErrorReason_ERROR_REASON_ALREADY_PROTECTED: {
		Code:   codes.AlreadyExists,
		Cause:  "The VM is protected already, by this host or by another one with the same VM id.",
		Action: "Use the existing protection (`landfall status VM`), or end it first with `landfall unprotect VM`.",
	},
	typesv1.ErrorReason_ERROR_REASON_POLICY_IN_USE: {
		Code:   codes.FailedPrecondition,
		Cause:  "Protected VMs still use the policy.",
		Action: "Move those VMs to another policy or unprotect them, then delete the policy.",
	},
	typesv1.ErrorReason_ERROR_REASON_POLICY_INVALID: {
		Code:   codes.InvalidArgument,
		Cause:  "The policy's values are out of range or contradict each other.",
		Action: "Correct the values named above and apply the policy again.",
	},
	typesv1.ErrorReason_ERROR_REASON_PREREQUISITES_NOT_MET: {
		Code:   codes.FailedPrecondition,
		Cause:  "The VM or its host fails one or more checks.",
		Action: "Resolve every check listed above, then protect the VM again.",
	},
	typesv1.ErrorReason_ERROR_REASON_JOB_IN_PROGRESS: {
		Code:        codes.FailedPrecondition,
		Cause:       "Another job is working on the same item.",
		Action:      "Wait for it: `landfall jobs` lists them, `landfall jobs show JOB --watch` follows one.",
		Recoverable: true,
		RetryAfter:  10 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE: {
		Code:   codes.FailedPrecondition,
		Cause:  "A test failover of the VM was not cleaned up.",
		Action: "Run `landfall failover cleanup VM`, then repeat the action.",
	},
	typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID: {
		Code:   codes.FailedPrecondition,
		Cause:  "The definition of the machine (vm.yaml, or the YAML beside a QEMU machine's sockets) is missing, cannot be parsed, or contradicts itself, another one, or what it describes.",
		Action: "Correct the file as the message says; Landfall reads it again by itself.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING: {
		Code:   codes.FailedPrecondition,
		Cause:  "The image file was moved, renamed or deleted, its volume is not mounted, or the disk is not attached to the machine.",
		Action: "Put the file back, mount its volume, attach the disk, or remove it from the VM's definition.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The image is shorter than its format says or not a whole number of sectors: an interrupted copy, or a file that is no disk image.",
		Action: "Restore the image from a good copy; check it with `landfall disk info FILE`.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The same image stands twice in the VM's definition, perhaps by two paths.",
		Action: "Name each image once.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The image is of a format or a kind (for example differencing, shared, or without a lasting node name in QEMU) that cannot be protected.",
		Action: "Do what the message says. An image of another format can be converted by `landfall disk convert` to raw or fixed VHD; a disk that is not needed can be left out of the machine's definition.",
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE: {
		Code:        codes.FailedPrecondition,
		Cause:       "Another process has the image open for writing, so changes could be missed.",
		Action:      "Stop the other process; let guests write through the change-tracker's export only.",
		Recoverable: true,
		RetryAfter:  10 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_CHANGED_OFFLINE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The image was edited, resized or replaced while nothing tracked it.",
		Action: "Run `landfall resync VM`; it sends only what differs.",
	},
	typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE: {
		Code:        codes.ResourceExhausted,
		Cause:       "The volume that holds the disk and its logs is nearly full.",
		Action:      "Free space on the volume. The guest is not affected; tracking fell back to marking extents until there is room.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The disk is larger than the recovery target supports.",
		Action: "Shrink or split the disk, exclude it, or choose another target.",
	},
	typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The VM is not protected on this host, or its tracking has been removed.",
		Action: "Enable protection, or restart it with `landfall resync VM` if it was enabled.",
	},
	typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN: {
		Code:   codes.FailedPrecondition,
		Cause:  "A log or sidecar is missing, damaged or of another disk, so what changed is not known.",
		Action: "Run `landfall resync VM`; check the volume for errors if it comes back.",
	},
	typesv1.ErrorReason_ERROR_REASON_LOG_LIMIT_REACHED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The logs reached their share of the disk because points could not be shipped for long, or the guest writes faster than the link.",
		Action: "Restore the link to storage or give it more bandwidth; a resynchronisation then starts by itself, or start it with `landfall resync VM`.",
	},
	typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH: {
		Code:   codes.FailedPrecondition,
		Cause:  "A newer decision (a failover, a restarted cycle) has taken over; this caller worked on an old one.",
		Action: "Nothing: the newer task does the work. If it repeats, look for a second scheduler on the same state.",
	},
	typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH: {
		Code:   codes.FailedPrecondition,
		Cause:  "The VM was protected again, or is claimed by another installation.",
		Action: "Check which installation protects the VM; unprotect it in the other one.",
	},
	typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT: {
		Code:   codes.FailedPrecondition,
		Cause:  "The host never cut this point, or it was settled before it could be cut.",
		Action: "Nothing: the scheduler lists the host's points and reconciles. Report it if cycles keep failing.",
	},
	typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The point was settled already with another outcome; the first settle wins.",
		Action: "Nothing: the next cycle starts from the base that the host holds.",
	},
	typesv1.ErrorReason_ERROR_REASON_POINT_OPEN: {
		Code:        codes.FailedPrecondition,
		Cause:       "Another point or pass of the VM has not been settled.",
		Action:      "Wait for it: `landfall status VM`. The scheduler settles abandoned ones by itself.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED: {
		Code:        codes.FailedPrecondition,
		Cause:       "After a crash or with little space, some extents are known to have changed, but not how; they must be read again first.",
		Action:      "Nothing: the scheduler runs the pass before the next point.",
		Recoverable: true,
		RetryAfter:  time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN: {
		Code:   codes.FailedPrecondition,
		Cause:  "The task belongs to a pass that was settled or replaced.",
		Action: "Nothing: the scheduler issues tasks of the pass that is open.",
	},
	typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The host's driver, or the guest, cannot give application-consistent points.",
		Action: "Set the policy to crash-consistent points, or install what the guest needs for quiescing.",
	},
	typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED: {
		Code:   codes.FailedPrecondition,
		Cause:  "A failover has closed the lineage; writes from the source no longer count.",
		Action: "Finish the failover: `landfall failover commit VM`, and protect the recovered machine as a new one; or `landfall failover cancel VM`.",
	},
	typesv1.ErrorReason_ERROR_REASON_STALE_OPEN: {
		Code:   codes.FailedPrecondition,
		Cause:  "The task was issued before the lineage was opened again after a failover.",
		Action: "Nothing: new tasks follow the newest opening.",
	},
	typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD: {
		Code:   codes.FailedPrecondition,
		Cause:  "The host's base is newer than what the journal holds, for example after a rewind.",
		Action: "Run `landfall resync VM` if it does not start by itself.",
	},
	typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED: {
		Code:   codes.FailedPrecondition,
		Cause:  "A later point is in the journal already; this task came too late.",
		Action: "Nothing: the late task is dropped and no data is lost.",
	},
	typesv1.ErrorReason_ERROR_REASON_PASS_OUT_OF_ORDER: {
		Code:   codes.FailedPrecondition,
		Cause:  "A task of an earlier pass came after a later pass began.",
		Action: "Nothing: the scheduler runs the passes again in order.",
	},
	typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN: {
		Code:   codes.DataLoss,
		Cause:  "A manifest is missing or was changed in storage, outside of Landfall.",
		Action: "Do not delete anything. Restore the missing object (undelete). Otherwise bring up a point from before the damage with `landfall recover --from-storage URL`, and protect the machine anew.",
	},
	typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT: {
		Code:   codes.DataLoss,
		Cause:  "A segment is missing from storage, or its bytes are not those that were written.",
		Action: "Do not delete anything. Restore the object (undelete, versioning); otherwise use a point before it, and for new ones end the protection and protect the machine again: the points so far stay in storage.",
	},
	typesv1.ErrorReason_ERROR_REASON_MANIFEST_CORRUPT: {
		Code:   codes.DataLoss,
		Cause:  "A manifest, configuration or checkpoint is damaged, or was written by a newer version.",
		Action: "Upgrade if the version is newer; otherwise restore the object from storage's own versions.",
	},
	typesv1.ErrorReason_ERROR_REASON_LEASE_LOST: {
		Code:        codes.Aborted,
		Cause:       "Another worker took over the replica disk, usually after this one paused for too long.",
		Action:      "Nothing: the other worker goes on. If it repeats, look for overloaded or duplicated workers.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE: {
		Code:        codes.Unavailable,
		Cause:       "The storage account or folder does not answer, throttles, or refuses for a passing cause.",
		Action:      "Check the network path, credentials and service health of the storage; Landfall keeps trying by itself.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL: {
		Code:        codes.ResourceExhausted,
		Cause:       "The volume or the account has no room left, or a quota is reached.",
		Action:      "Free space, raise the quota, or shorten retention in the policy.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_RETIRED: {
		Code:   codes.FailedPrecondition,
		Cause:  "Retention has removed this part of the journal.",
		Action: "Choose a newer point: `landfall points VM`.",
	},
	typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The plan was never applied, or was deleted.",
		Action: "List the plans with `landfall plan get`.",
	},
	typesv1.ErrorReason_ERROR_REASON_SITE_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "No host of that site ever registered.",
		Action: "List the hosts and their sites with `landfall hosts`.",
	},
	typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND: {
		Code:   codes.NotFound,
		Cause:  "The opened point was closed, or nothing was read from it for so long that its session ended.",
		Action: "Open the point again with `landfall points open VM --point P`.",
	},
	typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID: {
		Code:   codes.InvalidArgument,
		Cause:  "The plan has no groups, names a machine twice, or names one that cannot exist.",
		Action: "Correct the fields named in the message and apply the plan again.",
	},
	typesv1.ErrorReason_ERROR_REASON_BANDWIDTH_INVALID: {
		Code:   codes.InvalidArgument,
		Cause:  "A window of the schedule is impossible, or the time zone is unknown.",
		Action: "Correct the fields named in the message and give the command again.",
	},
	typesv1.ErrorReason_ERROR_REASON_FORMAT_NEWER: {
		Code:   codes.FailedPrecondition,
		Cause:  "A newer version of Landfall wrote this object; this one does not know its format and does not guess.",
		Action: "Run the command with the version of Landfall that protected the machine, or a newer one; `landfall version` says which this is.",
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS: {
		Code:        codes.Unauthenticated,
		Cause:       "The credentials for storage are wrong, have expired, or were revoked.",
		Action:      "Renew them (SAS, certificate, federated token) in the settings under store.azure, then run `landfall storage validate`; Landfall tries again by itself.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION: {
		Code:        codes.PermissionDenied,
		Cause:       "The identity of this role has no right for this operation on this container.",
		Action:      "Give the role the rights that `landfall storage validate` lists for it; Landfall tries again by itself.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING: {
		Code:   codes.NotFound,
		Cause:  "A container of the lineage was deleted in storage, or the store is another one than before.",
		Action: "Check store.url; undelete the container within its soft-delete time; otherwise protect the machine again.",
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_WRITE_ONCE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The policy demands a write-once journal, and the container has no such policy, or a shorter one.",
		Action: "Set a time-based retention policy on the container as the message says and protect the machine again, or take write_once out of the policy.",
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CLOCK_SKEW: {
		Code:        codes.FailedPrecondition,
		Cause:       "The clock of this machine and the one of storage differ by more than storage accepts.",
		Action:      "Correct the clock of the machine named in the message (NTP); Landfall tries again by itself.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CONFIG_INVALID: {
		Code:   codes.InvalidArgument,
		Cause:  "The settings of the store cannot work: wrong URL, missing credential, or a combination that does not exist.",
		Action: "Correct the keys named in the message, then run `landfall storage validate`.",
	},
	typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_READY: {
		Code:   codes.FailedPrecondition,
		Cause:  "The identity lacks a right, the account is set up in a way that cannot work, or the store does not keep a promise.",
		Action: "Do what stands under \"To change\", then run `landfall storage validate` again.",
	},
	typesv1.ErrorReason_ERROR_REASON_REPLICA_TAMPERED: {
		Code:   codes.DataLoss,
		Cause:  "Something other than Landfall wrote to a replica disk, replaced it, or changed its number.",
		Action: "Do not delete anything. Find out who wrote (storage logs). Points are received on, and a failover reads them from checkpoints and the journal, not from that disk. To have a good one, end the protection and protect the machine again: the points so far stay in storage.",
	},
	typesv1.ErrorReason_ERROR_REASON_APPLY_BACKLOG_HIGH: {
		Code:        codes.ResourceExhausted,
		Cause:       "Points arrive faster than they are applied to the replica disks, or no applier works.",
		Action:      "Look at the uploaders of role apply: add one, or shorten apply_delay in the policy. A failover to latest-processed does not wait.",
		Recoverable: true,
		RetryAfter:  time.Minute,
	},
	typesv1.ErrorReason_ERROR_REASON_RANSOMWARE_SUSPECTED: {
		Code:   codes.FailedPrecondition,
		Cause:  "Churn jumped far above the usual and hardly compresses, as when something encrypts the machine; a full backup or a new database can look the same.",
		Action: "Look at the machine. If it is harmed, fail over to the last good point named in the message; if not, run `landfall points clear-suspicion VM`. Nothing is retired meanwhile.",
	},
	typesv1.ErrorReason_ERROR_REASON_POINT_HELD: {
		Code:   codes.FailedPrecondition,
		Cause:  "A hold keeps the point.",
		Action: "Release it first: `landfall points release VM --hold NAME`.",
	},
	typesv1.ErrorReason_ERROR_REASON_REDELIVERIES_EXHAUSTED: {
		Code:   codes.Aborted,
		Cause:  "A task failed or lost its worker as often as it may be delivered, and was parked.",
		Action: "See the parked task's reason in `landfall jobs show JOB` and correct it; the scheduler tries again by itself, or give the command again.",
	},
	typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED: {
		Code:   codes.FailedPrecondition,
		Cause:  "What changed on the source since the last point is no longer known.",
		Action: "Run `landfall resync VM`, or let the policy start it in its window. Points already received stay usable.",
	},
	typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY: {
		Code:   codes.FailedPrecondition,
		Cause:  "The folder given with --out holds files, perhaps of an earlier failover.",
		Action: "Name a new or empty folder, or clean up the earlier failover.",
	},
	typesv1.ErrorReason_ERROR_REASON_TARGET_UNSUPPORTED: {
		Code:   codes.InvalidArgument,
		Cause:  "The recovery target is misspelt or not built into this version.",
		Action: "Use one of the targets that `landfall failover test --help` lists.",
	},
	typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE: {
		Code:   codes.FailedPrecondition,
		Cause:  "The target's folder cannot be created or written: permissions, a read-only volume, or a missing parent.",
		Action: "Check permissions and the volume, or name another folder.",
	},
	typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE: {
		Code:        codes.Unavailable,
		Cause:       "The hypervisor's process is not running, or another program holds its control socket: QEMU serves one client per monitor.",
		Action:      "Start the machine; give Landfall a monitor socket of its own (a second -qmp option). It is tried again by itself.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE: {
		Code:   codes.FailedPrecondition,
		Cause:  "A planned or unplanned failover of the VM is under way, failed, or waits for commit.",
		Action: "Commit or cancel it first: landfall failover commit VM, or landfall failover cancel VM.",
	},
	typesv1.ErrorReason_ERROR_REASON_SOURCE_NOT_FENCED: {
		Code:   codes.FailedPrecondition,
		Cause:  "The source's host does not answer or says that the machine still runs: two copies could run at once.",
		Action: "Stop the machine at its site and keep it off, or use a planned failover. If the site is lost, repeat with --accept-unfenced; the VM stays critical until its host says that the machine is off.",
	},
	typesv1.ErrorReason_ERROR_REASON_GUEST_DID_NOT_STOP: {
		Code:        codes.DeadlineExceeded,
		Cause:       "The guest ignored the power button: nothing in it listens, or it is busy shutting down.",
		Action:      "Shut the guest down from inside; the failover goes on as soon as it is off. Or cancel it.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED: {
		Code:   codes.FailedPrecondition,
		Cause:  "A failover has taken the machine over; running it here would make two of it.",
		Action: "Commit or cancel that failover. Cancelling starts the machine again.",
	},
	typesv1.ErrorReason_ERROR_REASON_NOT_AT_SAFE_POINT: {
		Code:   codes.FailedPrecondition,
		Cause:  "The failover is between two safe points, or is final.",
		Action: "Wait until the present step has ended and try again. A committed failover is final: the recovered machine is the machine now, and is protected as a new one.",
	},
	typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN: {
		Code:        codes.Aborted,
		Cause:       "The frozen copy that a point is read from could not be kept: its scratch space is full, or writing to it took too long. The guest was not stopped.",
		Action:      "The next point takes the changes along. If it comes again, give the driver more scratch space (host_provider.qemu.scratch_dir) or shorten the copy interval.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID: {
		Code:        codes.FailedPrecondition,
		Cause:       "The export of a disk has another size, or does not offer the list of changes that the point needs.",
		Action:      "Look at the host's log; the point is given up and the next one tried. If it stays, resynchronise the VM.",
		Recoverable: true,
		RetryAfter:  5 * time.Second,
	},
	typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST: {
		Code:   codes.FailedPrecondition,
		Cause:  "The hypervisor was restarted or killed, or somebody removed the dirty bitmap: what changed since the last point is not known.",
		Action: "Resynchronise the VM: landfall resync VM. Source and replica are compared and only differences are sent.",
	},
	typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE: {
		Code:   codes.FailedPrecondition,
		Cause:  "A program or file that the target needs is not installed on the orchestrator's machine.",
		Action: "Install what is named, or choose another target.",
	},
	typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT: {
		Code:   codes.DeadlineExceeded,
		Cause:  "The recovered machine did not show the sign of life that was asked for: it boots slowly, with another firmware, or has no guest agent.",
		Action: "Look at the console text and the screenshot named in the job. A machine that runs is left as it is and may only be slow: when it is up, use it (a failover: landfall failover commit VM). Else take it away (landfall failover cancel VM, a test: landfall failover cleanup VM) and try again with another --boot, a longer --boot-timeout or a --console-pattern that the guest prints.",
	},
}
