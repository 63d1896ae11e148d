package replica

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// modelBugs are the planted bugs, with the property that each breaks; from is near a seed that is known to find it, to keep
// the short run short. design.md has the table.
var modelBugs = []struct {
	name string
	bugs bugs
	host hostBugs
	by   string // pattern of the violation
	from int
}{
	// Of protocol.md's list.
	{name: "batch mark without the lower bound", bugs: bugs{BatchMarkWithoutLowerBound: true}, by: "^S4"},
	{name: "progress before pages", bugs: bugs{ProgressBeforePages: true}, by: "^S4"},
	{name: "manifest before segments", bugs: bugs{ManifestBeforeSegments: true}, by: "^S1"},
	{name: "no pass ordinal", bugs: bugs{NoPassOrdinal: true}, by: "^S1"},
	{name: "half a pass as base", bugs: bugs{HalfPass: true}, by: "^S1"},
	{name: "worker raises its own epoch, open rule off", bugs: bugs{SelfRaisedEpoch: true, NoOpen: true}, by: "^S3"},
	{name: "no base below the state ordinal, open rule off", bugs: bugs{NoBaseRule: true, NoOpen: true}, by: "^S1", from: 218},
	{name: "both epoch and open rules off", bugs: bugs{NoEpoch: true, NoOpen: true}, by: "^S3"},
	{name: "both page lease and number check off", bugs: bugs{NoLeaseNoNumber: true}, by: "^S4"},
	{name: "checkpoint on unfinished work", bugs: bugs{CheckpointUnfinished: true}, by: "^S7"},
	{name: "extent cooled by a seal", host: hostBugs{CooledBySeal: true}, by: "^S1", from: 117},
	{name: "rewind not computed again", bugs: bugs{RewindNotComputedAgain: true}, by: "^S2"},
	// Others.
	{name: "no base below the state ordinal", bugs: bugs{NoBaseRule: true}, by: "^S1", from: 218},
	{name: "stale task", bugs: bugs{StaleTask: true}, by: "^(S1|R24)"},
	{name: "extent cooled by a flush", host: hostBugs{CooledByFlush: true}, by: "^S1"},
	{name: "log data older than its mark", host: hostBugs{OldLogData: true}, by: "^S1"},
	{name: "cut after it was given up", host: hostBugs{CutAfterGiven: true}, by: "^S[126]", from: 255},
	{name: "rewind misses a pass", bugs: bugs{RewindSkipsPartials: true}, by: "^S2"},
	{name: "rewind misses a rewind", bugs: bugs{RewindSkipsRewinds: true}, by: "^S2"},
	{name: "orphan collection by age", bugs: bugs{OrphansByAge: true}, by: "^(S1|S8|R24)"},
	{name: "retention without retired ranges", bugs: bugs{NoRetiredRanges: true}, by: "^R24"},
	{name: "a refilled number counts", bugs: bugs{RefillCounts: true}, by: "^S[126]", from: 205},
	{name: "floor raised after the deletion", bugs: bugs{FloorAfterDeletion: true}, by: "^(R24|S8)"},
	{name: "pin ignored", bugs: bugs{PinIgnored: true}, by: "^S8"},
	{name: "deleted by a record that lost its race", bugs: bugs{LostRaceDeletes: true}, by: "^(S8|R24)"},
	{name: "record put without If-Match", bugs: bugs{NoIfMatch: true}, by: "^(S8|R24)"},
	{name: "staging deleted before its checkpoint", bugs: bugs{StagingEarly: true}, by: "^S[48]"},
	{name: "unnamed snapshot deleted without a void record", bugs: bugs{SnapshotWithoutVoid: true}, by: "^(R23|S7)", from: 78},
	{name: "segments of a rewind at work deleted", bugs: bugs{RewindOrphansAnytime: true}, by: "^(S1|R24)", from: 4755},
	{name: "fence of anybody", bugs: bugs{AnyFence: true}, by: "^S3"},
	{name: "snapshot of a disk that moved", bugs: bugs{SnapshotAnyETag: true}, by: "^S7", from: 935},
	{name: "number read before the lease", bugs: bugs{NumberBeforeLease: true}, by: "^S4|changed by somebody else", from: 66},
	{name: "any rewind is this one", bugs: bugs{RewindTrustsAnyRewind: true}, by: "^S[25]"},
}

// TestModelCatches plants each bug and needs a violation of the right property within 2,000 seeds of one that is known.
func TestModelCatches(t *testing.T) {
	for _, c := range modelBugs {
		t.Run(c.name, func(t *testing.T) {
			from := c.from
			if seeds(t, 0) > 0 {
				from = 0 // the table's figures
			}
			ran, _, _, err := explore(from, 2000, planted{c.bugs, c.host}, nil)
			require.Error(t, err, "not found in %d interleavings", ran)
			if strings.Contains(c.by, "8") || strings.Contains(c.by, "24") { // what deletes too much may be met by a reader first
				c.by += "|replica is corrupt"
			}
			require.Regexp(t, c.by, violation(err))
			t.Logf("found after %d interleavings: %v", ran, err)
		})
	}
}
