package storagecheck

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/replica"
)

// Lineage is the one whose containers are used. The scheduler's check makes them; no machine is ever given it.
const Lineage = replica.ValidationLineage

// Result of one check.
type Result string

// The results.
const (
	OK   Result = "ok"
	Warn Result = "warn" // works; something should be changed
	Fail Result = "fail" // must be changed before use
	Skip Result = "skip" // not for this role, or this store has no such thing
)

// Check is one thing that was tried.
type Check struct {
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Found is what was seen, in a line.
	Found string `json:"found"`
	// Change is what to do about it; empty when nothing is to do.
	Change string `json:"change,omitempty"`
}

// Report is everything that was tried, in order.
type Report struct {
	Role   replica.Role `json:"role"`
	Checks []Check      `json:"checks"`
	// PutBytesPerSecond and PageBytesPerSecond are rates; 0 when the role does not write that.
	PutBytesPerSecond  int64 `json:"put_bytes_per_second,omitempty"`
	PageBytesPerSecond int64 `json:"page_bytes_per_second,omitempty"`
	// RequestTime is the median time of a small request.
	RequestTime time.Duration `json:"request_time,omitempty"`
	// Left are objects that this role may not delete again.
	Left []string `json:"left,omitempty"`
}

// Failed reports whether any check failed.
func (r *Report) Failed() bool {
	for _, c := range r.Checks {
		if c.Result == Fail {
			return true
		}
	}
	return false
}

func (r *Report) add(name string, result Result, change, format string, args ...any) {
	if result == OK || result == Skip {
		change = ""
	}
	r.Checks = append(r.Checks, Check{Name: name, Result: result, Found: fmt.Sprintf(format, args...), Change: change})
}

// Options of Run.
type Options struct {
	// Role to try the store as, with the credentials that the store was opened with.
	Role replica.Role
	// WriteOnce is what the policies demand of journals; 0 demands nothing.
	WriteOnce time.Duration
	// Bytes to send for the rates; 0 sends 32 MiB, below 0 nothing.
	Bytes int64
	// Clock is this machine's.
	Clock func() time.Time
}

// Run tries everything. The error is for what stops it at once, mostly that the store does not answer or does not accept the
// credentials; all else is in the report.
func Run(ctx context.Context, store blobstore.Store, o Options) (*Report, error) {
	if len(replica.Rights(o.Role)) == 0 {
		return nil, fmt.Errorf("role %q is none of %v: %w", o.Role, replica.Roles(), blobstore.ErrInvalid)
	}
	if o.Bytes == 0 {
		o.Bytes = 32 << 20
	}
	t := &trial{store: store, o: o, rights: replica.Rights(o.Role), tx: string(replica.NewTx()), report: &Report{Role: o.Role}}
	if err := t.clock(ctx); err != nil {
		return nil, err
	}
	if err := t.containers(ctx); err != nil {
		return nil, err
	}
	t.permissions(ctx)
	t.blocks(ctx)
	t.pages(ctx)
	t.speed(ctx)
	t.writeOnce(ctx)
	t.account(ctx)
	t.clean(ctx)
	return t.report, ctx.Err()
}

// Largest differences of the clocks: what a person should look at, and what storage refuses (Azure: 15 minutes).
const (
	skewWarn = 30 * time.Second
	skewFail = 10 * time.Minute
)

func (t *trial) clock(ctx context.Context) error {
	before := t.o.Clock()
	now, err := t.store.Now(ctx)
	if err != nil {
		return fmt.Errorf("ask the store for its time: %w", err)
	}
	after := t.o.Clock()
	took := after.Sub(before)
	skew := now.Sub(before.Add(took / 2)).Abs()
	result := OK
	switch {
	case skew > skewFail:
		result = Fail
	case skew > skewWarn:
		result = Warn
	}
	t.report.add("clock", result, "Correct the clock of this machine (NTP): storage refuses requests that are 15 minutes off.",
		"this machine and storage differ by %s", skew.Round(time.Second))
	return nil
}

func (t *trial) writeOnce(ctx context.Context) {
	const name = "write-once journal"
	p, ok := t.store.(blobstore.Protector)
	if !ok {
		result := Skip
		if t.o.WriteOnce > 0 {
			result = Fail
		}
		t.report.add(name, result, "Use a store that can be write-once, or take write_once out of the policy.", "this store has no such policy")
		return
	}
	have, err := p.ContainerProtection(ctx, Lineage.JournalContainer())
	change := "Set a time-based retention policy on the journal containers (lfj-…), and lock it once it is tried."
	switch {
	case err != nil:
		t.report.add(name, Warn, "Look at the policy by hand: this identity cannot.", "%v", err)
	case have.WriteOnce == 0 && t.o.WriteOnce > 0:
		t.report.add(name, Fail, change, "the policies demand %s, the container has no policy", t.o.WriteOnce)
	case have.WriteOnce == 0:
		t.report.add(name, Warn, change, "journals can be overwritten and deleted by who has the rights")
	case !have.Locked:
		t.report.add(name, OK, "", "there is a policy")
	default:
		t.report.add(name, OK, "", "there is a locked policy")
	}
}

func (t *trial) account(ctx context.Context) {
	in, ok := t.store.(blobstore.Inspector)
	if !ok {
		t.report.add("account", Skip, "", "a folder has no settings of an account")
		return
	}
	facts, err := in.Inspect(ctx)
	if facts.SKU != "" {
		result := OK
		if facts.Hierarchical {
			result = Fail
		}
		t.report.add("account", result, "Use a standard general-purpose v2 account without hierarchical namespace: this one has no page blobs.", "%s, %s", facts.Kind, facts.SKU)
	}
	if err != nil {
		result := Warn
		if !errors.Is(err, blobstore.ErrPermission) {
			result = Fail
		}
		t.report.add("account settings", result, "Look at it by hand: versioning must be off, soft delete of blobs should be on for some days.", "%v", err)
		return
	}
	result := OK
	if facts.Versioning {
		result = Fail
	}
	t.report.add("versioning", result, "Turn blob versioning off in this account: every snapshot of a replica would be kept as a version too.", "versioning is %s", onOff(facts.Versioning))
	result = OK
	if facts.SoftDelete == 0 {
		result = Warn
	}
	t.report.add("soft delete", result, "Turn soft delete of blobs on for at least 7 days: a deleted replica or checkpoint can be brought back.",
		"deleted blobs can be brought back for %d days", int(facts.SoftDelete.Hours()/24))
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
