package replica

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// modelStats count what the runs met, by rule.
type modelStats struct {
	steps int
	hits  map[string]int
}

func (s *modelStats) hit(rule string) {
	if s.hits == nil {
		s.hits = map[string]int{}
	}
	s.hits[rule]++
}

func (s *modelStats) add(o modelStats) {
	s.steps += o.steps
	for k, n := range o.hits {
		if s.hits == nil {
			s.hits = map[string]int{}
		}
		s.hits[k] += n
	}
}

func (s *modelStats) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d store calls", s.steps)
	for _, k := range slices.Sorted(maps.Keys(s.hits)) {
		fmt.Fprintf(&b, "\n  %9d  %s", s.hits[k], k)
	}
	return b.String()
}

// missing lists the branches that no run took.
func (s *modelStats) missing() (out []string) {
	for _, k := range modelBranches {
		if s.hits[k] == 0 {
			out = append(out, k)
		}
	}
	return out
}

// refusals are the branches that an error tells.
var refusals = []struct {
	err  error
	rule string
}{
	{ErrStaleEpoch, "R5 refused: epoch"},
	{ErrClosed, "R5 refused: closed"},
	{ErrStaleOpen, "R5 refused: open"},
	{ErrBaseAhead, "R5 refused: base ahead"},
	{ErrOrdinalUsed, "R5 refused: ordinal used"},
	{ErrPassOrder, "R10 refused: another pass"},
	{ErrHeadMoved, "R17 refused: the head moved"},
	{ErrNotFenced, "R16 refused: not the newest fence"},
	{ErrReopened, "R16 refused: this failover ended"},
	{ErrUnknownOutcome, "R7 outcome unknown"},
	{ErrLeaseLost, "R21 an applier lost its lease"},
	{ErrBusy, "R21 an applier is busy"},
}

// modelBranches must each have been taken by a long run: a rule that is never exercised proves nothing. ErrPassOrder is not
// among them: the open rule refuses first whatever it would refuse (its table test is TestAdmit's).
var modelBranches = []string{
	"R1 a power loss takes a write back", "R1 flushed but not sealed stays hot", "R1 sealed but not flushed stays hot",
	"R2 log data older than its mark is void", "R2 logs collapse into dirty extents",
	"R3 a point committed after it was given up", "R3 a point that was given up commits",
	"R4 cut repeated", "R4 host call late", "R4 host refuses a lower epoch", "R4 no cut after its settle", "R4 settle repeated: the first wins",
	"R5 refused: base ahead", "R5 refused: closed", "R5 refused: epoch", "R5 refused: open", "R5 refused: ordinal used",
	"R6 host ahead of a rewind resyncs", "R6 rewound", "R6 rewound back and forth", "R6 rewound forward before open",
	"R7 already in the chain is success", "R7 conflict at h+1", "R7 outcome unknown",
	"R8 a sleeper refilled a deleted number",
	"R9 read from storage after a crash",
	"R10 tasks of one pass follow each other",
	"R11 a pass with tasks missing is not settled", "R11 an empty partial",
	"R12 write during a pass",
	"R13 compared with the manifest below the mark", "R13 the mark's place was taken",
	"R14 comparing reads a checkpoint",
	"R15 checkpoint at the end of a run",
	"R16 close repeated is success", "R16 closed", "R16 refused: not the newest fence", "R16 refused: this failover ended", "R16 rewind repeated, or nothing to do",
	"R17 refused: the head moved", "R17 rewind computed again", "R17 rewind over retired manifests",
	"R18 the open's epoch is adopted",
	"R20 a batch redone up to a larger number", "R20 a page write of a lost lease is refused",
	"R21 a lease taken while another applier is alive", "R21 a number under a lost lease is refused", "R21 an applier lost its lease",
	"R21 two appliers alive", "R21 two appliers alive, one is busy",
	"R22 a disk moved between look and snapshot", "R22 checkpoints", "R22 no checkpoint while a disk moves", "R22 two checkpointers of one manifest",
	"R23 a void checkpoint stays void", "R23 void record",
	"R24 a pin of what is retired is refused", "R24 a rewind found its target retired", "R24 expired pins dropped", "R24 floor raised",
	"R24 only a pin keeps a point", "R24 pinned", "R24 range retired", "R24 the record changed under a writer", "R24 two retention workers",
	"R24 write-once hides, and frees later", "R24 write-once refuses a delete",
	"S8 a pinned point read", "S8 a point read without a pin", "S8 a point retired while it was read",
	"deleted: a snapshot", "deleted: checkpoints", "deleted: manifests", "deleted: orphans", "deleted: segments", "deleted: staging",
	"paused: a failover came and went", "paused: applier whose lease ended", "paused: apply while the chain grew", "paused: apply while something was retired",
	"paused: between segments and manifest", "paused: orch", "paused: read while something was retired", "paused: retain while something was retired", "paused: retain while the chain grew",
	"paused: scheduler", "paused: ship while something was retired", "paused: ship while the chain grew",
	"planned failover cancelled before its close", "planned failover lost nothing",
	"source: bitmap", "source: bitmap lost", "source: frozen ranges", "source: write log",
}
