package scheduler

import (
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Action is what a person may ask for.
type Action string

// The actions.
const (
	ActPause             Action = "pause"
	ActResume            Action = "resume"
	ActResync            Action = "resync"
	ActTestFailover      Action = "test failover"
	ActPlannedFailover   Action = "planned failover"
	ActUnplannedFailover Action = "unplanned failover"
	ActChangePoint       Action = "change point"
	ActCancelFailover    Action = "cancel failover"
	ActCommit            Action = "commit"
	ActFailback          Action = "failback"
	ActReverse           Action = "reverse replication"
	ActUpdateSettings    Action = "update settings"
	ActDisable           Action = "disable protection"
)

// Actions lists them in the order of the domain model's table.
func Actions() []Action {
	return []Action{ActPause, ActResume, ActResync, ActTestFailover, ActPlannedFailover, ActUnplannedFailover, ActChangePoint,
		ActCancelFailover, ActCommit, ActFailback, ActReverse, ActUpdateSettings, ActDisable}
}

// Legality says whether an action may be taken in a state.
type Legality int

// The three answers.
const (
	// Refused: reason INVALID_STATE.
	Refused Legality = iota
	// Legal.
	Legal
	// Cancels: legal, and it ends what is running.
	Cancels
)

// String is the sign of the domain model's table.
func (l Legality) String() string { return [...]string{"-", "Y", "C"}[l] }

// legal is the domain model's table 6.4, and what a failover under way allows: a cancellation (the orchestrator says
// whether it is at a safe point), and another try after a failure. What is not in it is refused.
var legal = func() map[State]map[Action]Legality {
	// One letter per action, in the order of Actions: Y legal, C cancels, - refused.
	//             P R S T P U C C C F R U D
	rows := map[State]string{
		EnablingFailed:              "------------Y",
		ReadyForInitialReplication:  "-Y---------YY",
		InitialReplicating:          "Y----------YC",
		InitialReplicationPaused:    "-Y---------YY",
		InitialReplicationFailed:    "-Y---------YY",
		Protected:                   "Y-YYYY-----YY",
		Paused:                      "-YYY-Y-----YY",
		ReplicationError:            "-YYY-Y-----YY",
		ResyncRequired:              "-YYY-Y-----YY",
		Resynchronizing:             "Y----C------C",
		ResyncPaused:                "-YY--C-----YY",
		PlannedFailoverInProgress:   "-------Y-----",
		UnplannedFailoverInProgress: "-------Y-----",
		FailoverFailed:              "----YY-Y-----",
		CancellingFailover:          "-----Y-------",
		FailedOver:                  "------YYY----",
		CommitFailed:                "-------YY----",
		Committed:                   "---------YYYY",
		FailbackSyncing:             "YY-----Y-Y---",
		FailbackWaitingInput:        "YY-----Y-Y---",
		FailedBack:                  "--------Y----",
		AwaitingReverse:             "----------YYY",
		MigrationCompleted:          "------------Y",
		DisablingFailed:             "------------Y",
	}
	out := make(map[State]map[Action]Legality, len(rows))
	for state, letters := range rows {
		out[state] = make(map[Action]Legality, len(letters))
		for i, a := range Actions() {
			switch letters[i] {
			case 'Y':
				out[state][a] = Legal
			case 'C':
				out[state][a] = Cancels
			}
		}
	}
	return out
}()

// duringTest refuses what a test failover that was not cleaned up stands in the way of (table 6.4, its row of the
// parallel part D).
var duringTest = map[Action]bool{
	ActResync: true, ActTestFailover: true, ActPlannedFailover: true, ActDisable: true,
}

// Allowed says whether an action may be taken in a state while the test failover, which runs beside it, is in the
// given one.
func Allowed(s State, test typesv1.TestFailoverState, a Action) Legality {
	l := legal[s][a]
	switch test {
	case typesv1.TestFailoverState_TEST_FAILOVER_STATE_UNSPECIFIED,
		typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE,
		typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED:
		return l
	}
	if duringTest[a] {
		return Refused
	}
	return l
}
