package scheduler

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var update = flag.Bool("update", false, "write golden files")

func allEvents() []Event {
	seen := map[Event]bool{}
	var out []Event
	for _, m := range Moves() {
		if !seen[m.Event] {
			seen[m.Event] = true
			out = append(out, m.Event)
		}
	}
	return out
}

// Every pair of a state and an event either has exactly one row or is refused with both names.
func TestEveryPairIsDecided(t *testing.T) {
	require.Len(t, table, len(Moves()), "two rows for one (state, event)")
	for _, s := range States() {
		for _, e := range allEvents() {
			to, fx, err := Next(s, e)
			if m, ok := table[moveKey{s, e}]; ok {
				require.NoError(t, err)
				require.Equal(t, m.To, to)
				require.Len(t, fx, len(m.Effects))
				continue
			}
			var illegal *IllegalMoveError
			require.ErrorAs(t, err, &illegal)
			require.Equal(t, s, to, "a refused event moves nothing")
			require.Contains(t, err.Error(), StateName(s))
			require.Contains(t, err.Error(), string(e))
		}
	}
}

// From Unprotected every state can be reached, and from every state the end can.
func TestNoStateIsAnIslandOrATrap(t *testing.T) {
	reach := func(start State, forward bool) map[State]bool {
		seen := map[State]bool{start: true}
		for grown := true; grown; {
			grown = false
			for _, m := range Moves() {
				from, to := m.From, m.To
				if !forward {
					from, to = to, from
				}
				if seen[from] && !seen[to] {
					seen[to], grown = true, true
				}
			}
		}
		return seen
	}
	fromStart, toEnd := reach(Unprotected, true), reach(Unprotected, false)
	for _, s := range States() {
		require.True(t, fromStart[s], "%s is never reached", StateName(s))
		require.True(t, toEnd[s], "%s never ends", StateName(s))
	}
}

// What table 6.4 offers, table 6.3 can do.
func TestLegalActionsHaveTheirMoves(t *testing.T) {
	moves := map[Action][]Event{
		ActPause:             {EvPause},
		ActResume:            {EvResume},
		ActResync:            {EvResync},
		ActPlannedFailover:   {EvPlannedFailover},
		ActUnplannedFailover: {EvUnplannedFailover},
		ActChangePoint:       {EvChangePoint},
		ActCancelFailover:    {EvCancelFailover, EvCancelFailback},
		ActCommit:            {EvCommit},
		ActFailback:          {EvFailbackBefore, EvCompleteFailback, EvFailbackSynced},
		ActReverse:           {EvReverseReplicate},
		ActDisable:           {EvDisable},
	}
	for _, s := range States() {
		for action, events := range moves {
			if Allowed(s, typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, action) == Refused {
				continue
			}
			if (s == FailbackSyncing || s == FailbackWaitingInput) && (action == ActPause || action == ActResume) {
				continue // pauses within the state
			}
			found := false
			for _, e := range events {
				_, _, err := Next(s, e)
				found = found || err == nil
			}
			require.True(t, found, "%s is legal in %s and has no move", action, StateName(s))
		}
	}
	for _, row := range legal {
		require.Len(t, row, countLegal(row))
	}
}

func countLegal(row map[Action]Legality) (n int) {
	for _, l := range row {
		if l != Refused {
			n++
		}
	}
	return n
}

func TestTestFailoverStandsInTheWay(t *testing.T) {
	waiting := typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP
	require.Equal(t, Refused, Allowed(Protected, waiting, ActTestFailover))
	require.Equal(t, Refused, Allowed(Protected, waiting, ActDisable))
	require.Equal(t, Refused, Allowed(Protected, waiting, ActResync))
	require.Equal(t, Legal, Allowed(Protected, waiting, ActPause))
	require.Equal(t, Legal, Allowed(Protected, waiting, ActUnplannedFailover))
	require.Equal(t, Cancels, Allowed(Resynchronizing, waiting, ActUnplannedFailover))
}

func TestDiagram(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "state-machine.md")
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(Diagram()), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, strings.ReplaceAll(string(want), "\r\n", "\n"), Diagram(), "run go test ./services/scheduler -run Diagram -update")
}
