package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/recovery"
)

// table prints one table.
func (a *app) table(rows func(w io.Writer)) {
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	rows(w)
	_ = w.Flush()
}

// moment is a time of storage, which belongs to no place: UTC.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05.000Z")
}

func (a *app) recoverSurvey(ctx context.Context, s *recovery.Session) error {
	w := a.newRecoverProgress()
	survey, err := s.Survey(ctx, w.lineages)
	w.close()
	if err != nil {
		return err
	}
	for _, warning := range survey.Warnings {
		fmt.Fprintln(a.err, "warning: "+warning)
	}
	for _, p := range survey.Protections {
		if p.Problem != "" {
			fmt.Fprintf(a.err, "warning: %s: %s\n", p.Title(), p.Problem)
		}
	}
	return a.printDocument(survey, func() {
		a.table(func(w io.Writer) {
			row(w, "SITE", "NAME", "ID", "LINEAGE", "STATE", "POINTS", "NEWEST POINT", "OF", "POLICY")
			for _, p := range survey.Protections {
				newest, of := "-", "-"
				if p.Newest != nil {
					newest, of = strconv.FormatUint(p.Newest.Ordinal, 10), moment(p.Newest.CutTime)
				}
				row(w, dash(p.Site()), dash(p.DisplayName), dash(p.ID()), p.Lineage, lineageState(p), p.Points, newest, of, dash(last(p.Policy)))
			}
		})
		if len(survey.Policies) > 0 {
			fmt.Fprintln(a.out)
			a.table(func(w io.Writer) { policyRows(w, survey.Policies...) })
		}
		if len(survey.Plans) > 0 {
			fmt.Fprintln(a.out)
			a.table(func(w io.Writer) { planRows(w, survey.Plans...) })
		}
	})
}

// lineageState says in words where a lineage is.
func lineageState(p *recovery.Protection) string {
	s := string(p.State)
	if p.State == recovery.StateClosed {
		s += " by " + p.Failover
	}
	if !p.Catalogued {
		s += ", not in the catalogue"
	}
	return s
}

func (a *app) recoverPoints(ctx context.Context, s *recovery.Session, p *recovery.Protection) error {
	points, warning, err := s.Points(ctx, p)
	if err != nil {
		return err
	}
	if warning != "" {
		fmt.Fprintln(a.err, "warning: "+warning)
	}
	doc := map[string]any{"vm": p.VM, "display_name": p.DisplayName, "lineage": p.Lineage, "state": p.State, "failover": p.Failover, "points": append([]recovery.Point{}, points...)}
	return a.printDocument(doc, func() {
		a.table(func(w io.Writer) {
			row(w, "POINT", "CUT", "CONSISTENCY", "STATE", "SIZE", "KEPT BY")
			for i := len(points) - 1; i >= 0; i-- {
				r := points[i]
				row(w, r.Ordinal, moment(r.CutTime), r.Consistency, r.State, human(r.Bytes), dash(strings.Join(r.Pins, " ")))
			}
		})
	})
}

func (a *app) describeRecovery(r *recovery.Result) {
	a.table(func(w io.Writer) {
		row(w, "Machine:", dash(strings.TrimSpace(r.DisplayName+" "+r.VM)))
		row(w, "Lineage:", r.Lineage)
		if r.CloseSequence > 0 {
			row(w, "Closed by:", fmt.Sprintf("%s, manifest %d", r.Recovery, r.CloseSequence))
		}
		row(w, "Point:", fmt.Sprintf("%d of %s, %s-consistent", r.Point, moment(r.CutTime), r.Consistency))
		row(w, "Folder:", r.Folder)
		row(w, "Files:", strings.Join(r.Files, " "))
		if r.Complete {
			row(w, "Written:", "nothing, it was complete")
		} else {
			row(w, "Written:", human(r.Bytes))
		}
		if r.Proof != "" {
			row(w, "Booted:", fmt.Sprintf("%s after %.1f s", r.Proof, r.Seconds))
		}
		if r.Console != "" {
			row(w, "Console:", r.Console)
		}
	})
}

func (a *app) describePlanRecovery(outcomes []*recovery.Outcome) {
	a.table(func(w io.Writer) {
		row(w, "GROUP", "MACHINE", "POINT", "OF", "FOLDER", "RESULT")
		for _, o := range outcomes {
			if r := o.Result; r != nil {
				what := "recovered"
				if r.Complete {
					what = "complete before"
				}
				if r.Proof != "" {
					what += ", " + r.Proof
				}
				row(w, o.Group, o.VM, r.Point, moment(r.CutTime), r.Folder, what)
				continue
			}
			what := "not begun"
			if o.Error != "" {
				what = o.Error
			}
			row(w, o.Group, o.VM, "-", "-", "-", what)
		}
	})
}

// recoverProgress prints how far recoveries are: all bytes in one line, steps as they end.
type recoverProgress struct {
	mu    sync.Mutex
	p     *progress
	bytes map[string]recovery.Update // by machine
}

func (a *app) newRecoverProgress() *recoverProgress {
	return &recoverProgress{p: newProgress(a.err), bytes: map[string]recovery.Update{}}
}

func (r *recoverProgress) update(u recovery.Update) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u.Total > 0 {
		r.bytes[u.VM] = u
		var all typesv1.JobProgress
		for _, b := range r.bytes {
			all.DoneBytes, all.TotalBytes, all.SentBytes = all.DoneBytes+b.Done, all.TotalBytes+b.Total, all.SentBytes+b.Sent
		}
		r.p.bytes(&all)
		return
	}
	if u.Detail != "" || u.Ended {
		r.p.done()
		fmt.Fprintf(r.p.w, "%s  %-18s %s\n", u.VM, u.Step, u.Detail)
	}
}

// note prints a line for people.
func (r *recoverProgress) note(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.p.done()
	fmt.Fprintln(r.p.w, line)
}

// lineages shows how many chains were read, on a terminal.
func (r *recoverProgress) lineages(done, total int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.p.terminal {
		fmt.Fprintf(r.p.w, "\r\033[K%d of %d lineages read", done, total)
		r.p.open = true
	}
}

func (r *recoverProgress) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.p.done()
}
