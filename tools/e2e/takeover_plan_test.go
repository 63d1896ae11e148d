package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// moment is which half of a failover is attacked: the way up, or the way to its end.
type moment string

const (
	onTheWayUp moment = "up"
	atTheEnd   moment = "end"
)

// takeoverPoints are where programs are killed during failovers. What every cycle passes is named with the way up only:
// a planned failover cuts and sends the last point there.
var takeoverPoints = map[moment]map[string][]string{
	onTheWayUp: {
		orchestrator: append(around("failover-orchestrator/", "stop-source", "close-lineage", "close", "choose-point", "check-target", "claim-target",
			"materialise-disks", "describe-machine", "rewind-replica", "drain-journal"), "failover-orchestrator/before-rest"),
		scheduler: append(around("scheduler/", "stop", "cut", "publish", "settle"), "scheduler/after-record"),
		tracker:   around("change-tracker/", "fence", "cut", "seal", "rename", "settle"),
		host:      around("host-provider/", "cut", "settle"),
		uploaderName: append(around("uploader/", "segment", "manifest", "publish"), "uploader/before-ack",
			"replica/before-checkpoint", "replica/after-checkpoint", "replica/before-page-write"),
	},
	atTheEnd: {
		orchestrator: append(around("failover-orchestrator/", "remove-copy", "open-lineage", "open", "confirm-close"), "failover-orchestrator/before-rest"),
		scheduler:    append(around("scheduler/", "cut", "settle"), "scheduler/after-record"),
		tracker:      around("change-tracker/", "cut", "settle"),
		host:         around("host-provider/", "cut", "settle"),
		uploaderName: around("uploader/", "segment", "manifest"),
	},
}

func around(prefix string, names ...string) []string {
	var out []string
	for _, n := range names {
		out = append(out, prefix+"before-"+n, prefix+"after-"+n)
	}
	return out
}

// passes says whether a run passes a failpoint in that half.
func (p takeoverPlan) passes(when moment, name string) bool {
	_, name, _ = strings.Cut(name, "/")
	_, name, _ = strings.Cut(name, "-")
	switch name {
	case "stop-source":
		return p.kind == takePlanned
	case "rewind-replica":
		return p.kind == takeOlder
	case "stop", "fence", "close", "close-lineage", "choose-point", "drain-journal", "rest":
		return p.kind != takeDrill
	case "open", "open-lineage":
		return p.end == endCancel
	case "remove-copy":
		return p.end != endCommit
	case "confirm-close":
		return p.end == endCommit
	case "record", "check-target", "claim-target", "materialise-disks", "describe-machine":
		return true
	}
	return when == onTheWayUp || p.end != endCommit // of a cycle: a committed one has none
}

// Kinds of failovers and their ends.
const (
	takePlanned   = "planned"
	takeLatest    = "latest"
	takeOlder     = "older"
	takeProcessed = "latest-processed"
	takeDrill     = "test"

	endCancel  = "cancel"
	endCommit  = "commit"
	endCleanUp = "cleanup"
)

// takeoverPlan is one run: a failover, its end, and what happens meanwhile.
type takeoverPlan struct {
	kind, end string
	early     time.Duration // when above 0: cancelled so long after it was asked for, wherever it stands then
	up, down  *kill
}

func (p takeoverPlan) String() string {
	s := p.kind + ", "
	if p.early > 0 {
		s += fmt.Sprintf("after %s ", p.early)
	}
	s += p.end
	if p.up != nil {
		s += "; " + p.up.String()
	}
	if p.down != nil {
		s += fmt.Sprintf("; while %s %s", p.end, p.down)
	}
	return s
}

// takeoverPlans draws the n runs of one product. The last one is committed: there is nothing after that.
func takeoverPlans(r *rand.Rand, fleet bool, n int) []takeoverPlan {
	kinds := []string{takePlanned, takeLatest, takePlanned, takeOlder, takeDrill, takeProcessed}
	r.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	var out []takeoverPlan
	for i := range n {
		p := takeoverPlan{kind: kinds[i%len(kinds)], end: endCancel}
		switch {
		case i == n-1:
			p.kind, p.end = []string{takePlanned, takeLatest, takeOlder}[r.IntN(3)], endCommit
		case p.kind == takeDrill:
			p.end = endCleanUp
		case r.IntN(4) == 0:
			p.early = time.Duration(1+r.IntN(2000)) * time.Millisecond
		}
		if attacked := r.IntN(4); attacked < 3 { // two of four up only, one both, one the end only
			k := p.draw(r, fleet, onTheWayUp)
			p.up = &k
			if attacked < 2 {
				out = append(out, p)
				continue
			}
		}
		k := p.draw(r, fleet, atTheEnd)
		p.down = &k
		out = append(out, p)
	}
	return out
}

// draw draws one attack.
func (p takeoverPlan) draw(r *rand.Rand, fleet bool, when moment) kill {
	targets := []string{
		orchestrator, orchestrator, orchestrator, orchestrator, scheduler, scheduler, scheduler, tracker, tracker, host, host, uploaderName, uploaderName,
		resync, scheduler2, orchestrator2, natsServer, everything, everything,
	}
	k := kill{target: targets[r.IntN(len(targets))], after: time.Duration(r.IntN(2000)) * time.Millisecond, hit: 1 + r.IntN(3)}
	names := slices.DeleteFunc(slices.Clone(takeoverPoints[when][k.target]), func(n string) bool { return !p.passes(when, n) })
	if len(names) > 0 && r.IntN(3) < 2 {
		k.failpoint = names[r.IntN(len(names))]
		switch {
		case k.failpoint == "scheduler/after-record":
			k.hit = 1 + r.IntN(10)
		case k.target == orchestrator, strings.HasSuffix(k.failpoint, "-fence"), strings.HasPrefix(k.failpoint, "replica/"):
			k.hit = 1 // each is reached once, or seldom
		}
	}
	if !fleet {
		k.target = landfall
		return k // one program: it cannot be paused against the others
	}
	if k.failpoint == "" && k.target != everything && r.IntN(3) == 0 {
		k.pause = time.Duration(2500+r.IntN(4000)) * time.Millisecond
	}
	return k
}
