package scheduler

import (
	"fmt"
	"slices"
	"strings"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// State is one of the values a protected VM's record can have: the contract's enumeration.
type State = typesv1.ProtectionState

// The states, without the prefix that generated code puts before them.
const (
	Unprotected                 = typesv1.ProtectionState_PROTECTION_STATE_UNPROTECTED
	EnablingProtection          = typesv1.ProtectionState_PROTECTION_STATE_ENABLING_PROTECTION
	EnablingFailed              = typesv1.ProtectionState_PROTECTION_STATE_ENABLING_FAILED
	ReadyForInitialReplication  = typesv1.ProtectionState_PROTECTION_STATE_READY_FOR_INITIAL_REPLICATION
	InitialReplicating          = typesv1.ProtectionState_PROTECTION_STATE_INITIAL_REPLICATING
	InitialReplicationPaused    = typesv1.ProtectionState_PROTECTION_STATE_INITIAL_REPLICATION_PAUSED
	InitialReplicationFailed    = typesv1.ProtectionState_PROTECTION_STATE_INITIAL_REPLICATION_FAILED
	FinalizingProtection        = typesv1.ProtectionState_PROTECTION_STATE_FINALIZING_PROTECTION
	Protected                   = typesv1.ProtectionState_PROTECTION_STATE_PROTECTED
	Paused                      = typesv1.ProtectionState_PROTECTION_STATE_PAUSED
	ReplicationError            = typesv1.ProtectionState_PROTECTION_STATE_REPLICATION_ERROR
	ResyncRequired              = typesv1.ProtectionState_PROTECTION_STATE_RESYNC_REQUIRED
	Resynchronizing             = typesv1.ProtectionState_PROTECTION_STATE_RESYNCHRONIZING
	ResyncPaused                = typesv1.ProtectionState_PROTECTION_STATE_RESYNC_PAUSED
	PlannedFailoverInProgress   = typesv1.ProtectionState_PROTECTION_STATE_PLANNED_FAILOVER_IN_PROGRESS
	UnplannedFailoverInProgress = typesv1.ProtectionState_PROTECTION_STATE_UNPLANNED_FAILOVER_IN_PROGRESS
	FailoverFailed              = typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED
	FailedOver                  = typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER
	ChangingRecoveryPoint       = typesv1.ProtectionState_PROTECTION_STATE_CHANGING_RECOVERY_POINT
	CancellingFailover          = typesv1.ProtectionState_PROTECTION_STATE_CANCELLING_FAILOVER
	Committing                  = typesv1.ProtectionState_PROTECTION_STATE_COMMITTING
	CommitFailed                = typesv1.ProtectionState_PROTECTION_STATE_COMMIT_FAILED
	Committed                   = typesv1.ProtectionState_PROTECTION_STATE_COMMITTED
	FailbackSyncing             = typesv1.ProtectionState_PROTECTION_STATE_FAILBACK_SYNCING
	FailbackWaitingInput        = typesv1.ProtectionState_PROTECTION_STATE_FAILBACK_WAITING_INPUT
	FailbackCompleting          = typesv1.ProtectionState_PROTECTION_STATE_FAILBACK_COMPLETING
	FailedBack                  = typesv1.ProtectionState_PROTECTION_STATE_FAILED_BACK
	CommittingFailback          = typesv1.ProtectionState_PROTECTION_STATE_COMMITTING_FAILBACK
	FailbackFailed              = typesv1.ProtectionState_PROTECTION_STATE_FAILBACK_FAILED
	AwaitingReverse             = typesv1.ProtectionState_PROTECTION_STATE_AWAITING_REVERSE
	Reprotecting                = typesv1.ProtectionState_PROTECTION_STATE_REPROTECTING
	MigrationCompleted          = typesv1.ProtectionState_PROTECTION_STATE_MIGRATION_COMPLETED
	Disabling                   = typesv1.ProtectionState_PROTECTION_STATE_DISABLING
	DisablingFailed             = typesv1.ProtectionState_PROTECTION_STATE_DISABLING_FAILED
	stateUnspecified            = typesv1.ProtectionState_PROTECTION_STATE_UNSPECIFIED
	statePrefix                 = "PROTECTION_STATE_"
)

// States lists every state, in the order of the contract.
func States() []State {
	out := make([]State, 0, len(typesv1.ProtectionState_name))
	for n := range typesv1.ProtectionState_name {
		if s := State(n); s != stateUnspecified {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

// StateName is the state as people read it: "InitialReplicating".
func StateName(s State) string {
	var b strings.Builder
	for _, word := range strings.Split(strings.TrimPrefix(s.String(), statePrefix), "_") {
		if word != "" {
			b.WriteString(word[:1] + strings.ToLower(word[1:]))
		}
	}
	return b.String()
}

// Event is something that may move a VM from one state to another. Guards are part of the event's name, so that the
// table stays a pure function of (state, event).
type Event string

// The events. Those of failover are raised by what the orchestrator's record says, see follow.go; those of failback come
// with later releases.
const (
	EvEnable              Event = "enable"
	EvEnablingFailed      Event = "enabling-failed"
	EvRelationshipCreated Event = "relationship-created"
	EvStartsLater         Event = "relationship-created-starts-later"
	EvStart               Event = "start-initial-replication"
	EvDisksSent           Event = "disks-sent"
	EvFinalized           Event = "finalized"
	EvFinalizeFailed      Event = "finalize-failed"
	EvTick                Event = "tick"
	EvRecoverableError    Event = "recoverable-error"
	EvNonRecoverableError Event = "non-recoverable-error"
	EvPause               Event = "pause"
	EvResume              Event = "resume"
	EvBaselineLost        Event = "baseline-lost"
	EvResync              Event = "resync"
	EvNetworkOutage       Event = "network-outage"
	EvCancelResync        Event = "cancel-resync"
	EvResyncCompleted     Event = "resync-completed"
	EvPlannedFailover     Event = "planned-failover"
	EvUnplannedFailover   Event = "unplanned-failover"
	EvSourceStopFailed    Event = "source-stop-failed"
	EvTargetRunning       Event = "target-running"
	EvTargetFailed        Event = "target-failed"
	EvAbandonPlanned      Event = "abandon-planned-failover"
	EvAbandonUnplanned    Event = "abandon-unplanned-failover"
	EvChangePoint         Event = "change-point"
	EvCancelFailover      Event = "cancel-failover"
	EvCancelledClean      Event = "failover-cancelled-source-unchanged"
	EvCancelledDiverged   Event = "failover-cancelled-source-diverged"
	EvCancelledPaused     Event = "failover-cancelled-was-paused"
	EvCancelledError      Event = "failover-cancelled-was-stopped"
	EvCommit              Event = "commit"
	EvCommitted           Event = "committed"
	EvCommitError         Event = "commit-error"
	EvCompleteMigration   Event = "complete-migration"
	EvFailbackBefore      Event = "failback-before-failover"
	EvFailbackDuring      Event = "failback-during-failover"
	EvFailbackSynced      Event = "failback-synced"
	EvCancelFailback      Event = "cancel-failback"
	EvCompleteFailback    Event = "complete-failback"
	EvSourceRunning       Event = "source-running"
	EvFailbackError       Event = "failback-error"
	EvRetryFailback       Event = "retry-failback"
	EvAbandonFailback     Event = "abandon-failback"
	EvReverseReplicate    Event = "reverse-replicate"
	EvBaselineEqual       Event = "baseline-equal"
	EvDisable             Event = "disable"
	EvDisabled            Event = "disabled"
	EvDisableFailed       Event = "disable-failed"
)

// Effect names what a move brings with it, for the reader of the table, the diagram and the event's cause. The
// reconciler reads the state, not the effects: a step that was lost in a crash is found again from the state.
type Effect string

// The effects.
const (
	FxJob             Effect = "open job"
	FxCheck           Effect = "check prerequisites"
	FxListFindings    Effect = "list all findings"
	FxStartTracking   Effect = "start tracking"
	FxBeginPass       Effect = "begin full pass"
	FxFinalCut        Effect = "cut, commit as base"
	FxFinalize        Effect = "apply target settings"
	FxRetry           Effect = "next rung of the ladder"
	FxAlert           Effect = "alert, no retry"
	FxStopCycles      Effect = "stop cycles, keep tracking"
	FxCycle           Effect = "run a delta cycle"
	FxRecordReason    Effect = "record the reason"
	FxRaiseEpoch      Effect = "raise the epoch"
	FxCompare         Effect = "compare and send the difference"
	FxKeepCursor      Effect = "keep the cursor"
	FxDropCursor      Effect = "drop the cursor"
	FxCancelActivity  Effect = "cancel the present activity"
	FxStopSource      Effect = "stop the source, last delta, fence"
	FxBuildTarget     Effect = "build the target from the point"
	FxActiveRecovery  Effect = "active location is recovery"
	FxActivePrimary   Effect = "active location is primary"
	FxDiscardTarget   Effect = "discard the target"
	FxDeletePoints    Effect = "close the lineage, points go by retention"
	FxOverlay         Effect = "sync into an overlay"
	FxDropOverlay     Effect = "drop the overlay"
	FxStopTarget      Effect = "stop the target, last delta"
	FxDeleteTarget    Effect = "delete target VM and disks"
	FxReverse         Effect = "build the reverse relationship"
	FxRemoveRelations Effect = "remove the relationship"
	FxForget          Effect = "delete the record, keep storage"
)

// Move is one row of the table.
type Move struct {
	From    State
	Event   Event
	To      State
	Effects []Effect
}

type moveKey struct {
	from  State
	event Event
}

// rows is the whole life of a VM (domain model, section 6.3). A row may name several states it starts from.
var rows = []struct {
	from    []State
	event   Event
	to      State
	effects []Effect
}{
	// Protection begins.
	{[]State{Unprotected, EnablingFailed}, EvEnable, EnablingProtection, []Effect{FxJob, FxCheck}},
	{[]State{EnablingProtection}, EvRelationshipCreated, InitialReplicating, []Effect{FxStartTracking, FxBeginPass}},
	{[]State{EnablingProtection}, EvStartsLater, ReadyForInitialReplication, []Effect{FxStartTracking}},
	{[]State{EnablingProtection}, EvRecoverableError, EnablingProtection, []Effect{FxRetry}},
	{[]State{EnablingProtection}, EvEnablingFailed, EnablingFailed, []Effect{FxListFindings}},
	{[]State{ReadyForInitialReplication}, EvStart, InitialReplicating, []Effect{FxBeginPass}},
	{[]State{ReadyForInitialReplication}, EvResume, InitialReplicating, []Effect{FxBeginPass}},

	// Initial replication.
	{[]State{InitialReplicating}, EvDisksSent, FinalizingProtection, []Effect{FxFinalCut, FxFinalize}},
	{[]State{InitialReplicating}, EvRecoverableError, InitialReplicating, []Effect{FxRetry, FxKeepCursor}},
	{[]State{InitialReplicating}, EvNonRecoverableError, InitialReplicationFailed, []Effect{FxAlert, FxKeepCursor}},
	{[]State{InitialReplicating}, EvPause, InitialReplicationPaused, []Effect{FxKeepCursor}},
	{[]State{InitialReplicationPaused, InitialReplicationFailed}, EvResume, InitialReplicating, nil},
	{[]State{InitialReplicating}, EvBaselineLost, ResyncRequired, []Effect{FxRecordReason, FxDropCursor}},
	{[]State{FinalizingProtection}, EvFinalized, Protected, nil},
	{[]State{FinalizingProtection}, EvFinalizeFailed, Protected, []Effect{FxAlert}},

	// Delta replication.
	{[]State{Protected}, EvTick, Protected, []Effect{FxCycle}},
	{[]State{Protected}, EvRecoverableError, Protected, []Effect{FxRetry}},
	{[]State{Protected}, EvNonRecoverableError, ReplicationError, []Effect{FxAlert}},
	{[]State{Protected}, EvPause, Paused, []Effect{FxStopCycles}},
	{[]State{Paused}, EvResume, Protected, nil},
	{[]State{ReplicationError}, EvResume, Protected, nil},

	// Resynchronisation.
	{[]State{Protected, Paused, ReplicationError}, EvBaselineLost, ResyncRequired, []Effect{FxRecordReason}},
	{[]State{Protected, Paused, ReplicationError, ResyncRequired}, EvResync, Resynchronizing, []Effect{FxJob, FxRaiseEpoch, FxCompare}},
	{[]State{ResyncRequired}, EvResume, Resynchronizing, []Effect{FxJob, FxRaiseEpoch, FxCompare}},
	{[]State{Resynchronizing}, EvPause, ResyncPaused, []Effect{FxKeepCursor}},
	{[]State{Resynchronizing}, EvNetworkOutage, ResyncPaused, []Effect{FxKeepCursor}},
	{[]State{ResyncPaused}, EvResume, Resynchronizing, []Effect{FxKeepCursor}},
	{[]State{ResyncPaused}, EvResync, Resynchronizing, []Effect{FxKeepCursor}},
	{[]State{Resynchronizing}, EvRecoverableError, Resynchronizing, []Effect{FxRetry, FxKeepCursor}},
	{[]State{Resynchronizing}, EvNonRecoverableError, ReplicationError, []Effect{FxAlert}},
	{[]State{Resynchronizing}, EvCancelResync, ResyncRequired, []Effect{FxDropCursor}},
	{[]State{Resynchronizing}, EvBaselineLost, ResyncRequired, []Effect{FxRecordReason, FxDropCursor}},
	{[]State{Resynchronizing}, EvResyncCompleted, Protected, []Effect{FxFinalCut}},

	// Failover.
	{[]State{Protected, Paused, ReplicationError, ResyncRequired}, EvUnplannedFailover, UnplannedFailoverInProgress, []Effect{FxJob, FxBuildTarget}},
	{[]State{Resynchronizing, ResyncPaused}, EvUnplannedFailover, UnplannedFailoverInProgress, []Effect{FxJob, FxCancelActivity, FxBuildTarget}},
	{[]State{Protected}, EvPlannedFailover, PlannedFailoverInProgress, []Effect{FxJob, FxStopSource, FxBuildTarget}},
	{[]State{PlannedFailoverInProgress}, EvSourceStopFailed, FailoverFailed, []Effect{FxAlert}},
	{[]State{PlannedFailoverInProgress, UnplannedFailoverInProgress}, EvTargetRunning, FailedOver, []Effect{FxActiveRecovery}},
	{[]State{PlannedFailoverInProgress, UnplannedFailoverInProgress}, EvTargetFailed, FailoverFailed, []Effect{FxAlert}},
	{[]State{FailoverFailed}, EvPlannedFailover, PlannedFailoverInProgress, []Effect{FxStopSource, FxBuildTarget}},
	{[]State{FailoverFailed}, EvUnplannedFailover, UnplannedFailoverInProgress, []Effect{FxBuildTarget}},
	{[]State{FailoverFailed}, EvAbandonPlanned, Protected, []Effect{FxDiscardTarget}},
	{[]State{FailoverFailed}, EvAbandonUnplanned, ResyncRequired, []Effect{FxDiscardTarget, FxRecordReason}},
	{[]State{FailedOver}, EvChangePoint, ChangingRecoveryPoint, []Effect{FxBuildTarget}},
	{[]State{ChangingRecoveryPoint}, EvTargetRunning, FailedOver, nil},
	{[]State{ChangingRecoveryPoint}, EvTargetFailed, FailoverFailed, []Effect{FxAlert}},
	{[]State{FailedOver, CommitFailed}, EvCancelFailover, CancellingFailover, []Effect{FxDiscardTarget}},
	{[]State{PlannedFailoverInProgress, UnplannedFailoverInProgress}, EvCancelFailover, CancellingFailover, []Effect{FxCancelActivity, FxDiscardTarget}},
	{[]State{FailoverFailed}, EvCancelFailover, CancellingFailover, []Effect{FxDiscardTarget}},
	{[]State{CancellingFailover}, EvCancelledClean, Protected, []Effect{FxActivePrimary}},
	{[]State{CancellingFailover}, EvCancelledDiverged, ResyncRequired, []Effect{FxActivePrimary, FxRecordReason}},
	{[]State{CancellingFailover}, EvCancelledPaused, Paused, []Effect{FxActivePrimary}},
	{[]State{CancellingFailover}, EvCancelledError, ReplicationError, []Effect{FxActivePrimary}},
	{[]State{CancellingFailover}, EvUnplannedFailover, UnplannedFailoverInProgress, []Effect{FxBuildTarget}},
	{[]State{FailedOver, CommitFailed}, EvCommit, Committing, []Effect{FxDeletePoints}},
	{[]State{Committing}, EvCommitted, Committed, nil},
	{[]State{Committing}, EvCommitError, CommitFailed, []Effect{FxAlert}},
	{[]State{FailedOver, Committed}, EvCompleteMigration, MigrationCompleted, []Effect{FxRemoveRelations}},

	// Failback.
	{[]State{Committed}, EvFailbackBefore, FailbackSyncing, []Effect{FxJob, FxOverlay}},
	{[]State{Committed}, EvFailbackDuring, FailbackCompleting, []Effect{FxJob, FxStopTarget}},
	{[]State{FailbackSyncing}, EvFailbackSynced, FailbackWaitingInput, nil},
	{[]State{FailbackSyncing, FailbackWaitingInput}, EvCancelFailback, Committed, []Effect{FxDropOverlay}},
	{[]State{FailbackSyncing, FailbackWaitingInput}, EvFailbackError, FailbackFailed, []Effect{FxKeepCursor}},
	{[]State{FailbackWaitingInput}, EvCompleteFailback, FailbackCompleting, []Effect{FxStopTarget}},
	{[]State{FailbackCompleting}, EvSourceRunning, FailedBack, []Effect{FxActivePrimary}},
	{[]State{FailbackCompleting}, EvFailbackError, FailbackFailed, []Effect{FxAlert}},
	{[]State{FailbackFailed}, EvRetryFailback, FailbackSyncing, []Effect{FxKeepCursor}},
	{[]State{FailbackFailed}, EvAbandonFailback, Committed, []Effect{FxDropOverlay}},
	{[]State{FailedBack}, EvCommit, CommittingFailback, []Effect{FxDeleteTarget}},
	{[]State{CommittingFailback}, EvCommitted, AwaitingReverse, nil},
	{[]State{AwaitingReverse, Committed}, EvReverseReplicate, Reprotecting, []Effect{FxJob, FxReverse}},
	{[]State{Reprotecting}, EvBaselineEqual, Protected, nil},
	{[]State{Reprotecting}, EvBaselineLost, ResyncRequired, []Effect{FxRecordReason}},

	// The end.
	{[]State{EnablingFailed, ReadyForInitialReplication, InitialReplicationPaused, InitialReplicationFailed, Protected, Paused,
		ReplicationError, ResyncRequired, ResyncPaused, Committed, AwaitingReverse, DisablingFailed, MigrationCompleted},
		EvDisable, Disabling, []Effect{FxJob, FxRaiseEpoch, FxRemoveRelations}},
	{[]State{InitialReplicating, Resynchronizing}, EvDisable, Disabling, []Effect{FxJob, FxCancelActivity, FxRaiseEpoch, FxRemoveRelations}},
	{[]State{Disabling}, EvRecoverableError, Disabling, []Effect{FxRetry}},
	{[]State{Disabling}, EvDisableFailed, DisablingFailed, []Effect{FxAlert}},
	{[]State{Disabling}, EvDisabled, Unprotected, []Effect{FxForget}},
}

// table is rows by state and event; two rows for one pair are a bug that a test finds.
var table = func() map[moveKey]Move {
	t := make(map[moveKey]Move, 2*len(rows))
	for _, r := range rows {
		for _, from := range r.from {
			t[moveKey{from, r.event}] = Move{From: from, Event: r.event, To: r.to, Effects: r.effects}
		}
	}
	return t
}()

// IllegalMoveError says that an event has no meaning in a state.
type IllegalMoveError struct {
	State State
	Event Event
}

// Error names both.
func (e *IllegalMoveError) Error() string {
	return fmt.Sprintf("event %q is not legal in state %s", e.Event, StateName(e.State))
}

// Next is the state machine: the state that follows, and what the move brings with it. It is pure. An event without a
// row is an *IllegalMoveError.
func Next(s State, e Event) (State, []Effect, error) {
	m, ok := table[moveKey{s, e}]
	if !ok {
		return s, nil, &IllegalMoveError{State: s, Event: e}
	}
	return m.To, slices.Clone(m.Effects), nil
}

// Moves lists the table, in the order of its rows.
func Moves() []Move {
	var out []Move
	for _, r := range rows {
		for _, from := range r.from {
			out = append(out, table[moveKey{from, r.event}])
		}
	}
	return out
}
