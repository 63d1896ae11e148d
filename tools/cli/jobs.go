package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) jobsCommand() *cobra.Command {
	var limit int
	list := &cobra.Command{
		Use: "jobs", Short: "List jobs, newest first", Args: cobra.NoArgs, Example: "  landfall jobs --limit 10\n  landfall jobs show JOB --watch",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.jobService(ctx)
			if err != nil {
				return err
			}
			r, err := client.ListJobs(ctx, &schedulerv1.ListJobsRequest{PageSize: int32(limit)})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				row(w, "JOB", "KIND", "VM", "STATE", "STARTED", "STEP")
				for _, j := range r.Jobs {
					row(w, last(j.Name), label(j.Kind, "JOB_KIND_"), last(j.Target), label(j.State, "JOB_STATE_"), stamp(j.StartTime), currentStep(j))
				}
			})
		},
	}
	list.Flags().IntVar(&limit, "limit", 100, "at most this many")
	var watch bool
	show := &cobra.Command{
		Use: "show JOB", Short: "Show a job and its steps", Args: cobra.ExactArgs(1), Example: "  landfall jobs show JOB --watch",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.jobService(ctx)
			if err != nil {
				return err
			}
			r, err := client.GetJob(ctx, &schedulerv1.GetJobRequest{Name: resource("jobs", args[0])})
			if err != nil {
				return err
			}
			if watch && !ended(r.Job) {
				return a.followJob(cmd.Context(), r.Job, true)
			}
			return a.print(r.Job, func(w io.Writer) { describeJob(w, r.Job) })
		},
	}
	show.Flags().BoolVar(&watch, "watch", false, "follow it until it ends")
	list.AddCommand(show)
	return list
}

func describeJob(w io.Writer, j *typesv1.Job) {
	row(w, "Job:", last(j.Name))
	row(w, "Kind:", label(j.Kind, "JOB_KIND_"))
	row(w, "Target:", j.Target)
	row(w, "State:", label(j.State, "JOB_STATE_"))
	row(w, "Requested by:", j.RequestedBy)
	row(w, "Started:", stamp(j.StartTime))
	row(w, "Ended:", stamp(j.EndTime))
	if p := j.Progress; p != nil && p.TotalBytes > 0 {
		row(w, "Progress:", fmt.Sprintf("%s of %s (%s sent)", human(p.DoneBytes), human(p.TotalBytes), human(p.SentBytes)))
	}
	for _, s := range j.Steps {
		row(w, "Step "+s.Id+":", strings.TrimSuffix(label(s.State, "JOB_STATE_")+took(s)+": "+s.Detail, ": "))
	}
	if t := j.GetTestFailover(); t != nil {
		row(w, "Point:", fmt.Sprintf("%d of %s", t.Point, stamp(t.CutTime)))
		row(w, "Folder:", t.OutDir)
		row(w, "Files:", strings.Join(t.Files, " "))
		describeBoot(w, t.Boot)
	}
	if f := j.GetFailover(); f != nil {
		row(w, "Failover:", last(f.Failover))
		row(w, "Point:", fmt.Sprintf("%d of %s", f.Point, stamp(f.CutTime)))
		row(w, "Folder:", f.OutDir)
		row(w, "Files:", strings.Join(f.Files, " "))
		describeBoot(w, f.Boot)
	}
	if r := j.GetResync(); r != nil {
		row(w, "Compared:", human(r.ComparedBytes))
		row(w, "Differed:", human(r.DifferingBytes))
	}
	if e := j.Error; e != nil {
		row(w, "Error:", e.Reason+": "+e.What)
		row(w, "Likely cause:", e.Cause)
		row(w, "What to do:", e.Action)
	}
}

// took is how long a step that has ended took.
func took(s *typesv1.JobStep) string {
	if s.StartTime == nil || s.EndTime == nil {
		return ""
	}
	return fmt.Sprintf(" in %.1f s", s.EndTime.AsTime().Sub(s.StartTime.AsTime()).Seconds())
}

// describeBoot shows how a booted copy proved that it is up.
func describeBoot(w io.Writer, b *typesv1.BootEvidence) {
	if b == nil {
		return
	}
	if b.Proof == "" {
		row(w, "Not seen up:", fmt.Sprintf("waited %.1f s", b.Seconds))
	} else {
		row(w, "Booted:", fmt.Sprintf("%s after %.1f s", b.Proof, b.Seconds))
	}
	if b.ConsoleFile != "" {
		row(w, "Console:", b.ConsoleFile)
	}
	if b.ScreenshotFile != "" {
		row(w, "Screenshot:", b.ScreenshotFile)
	}
	if tail := strings.Split(strings.TrimSpace(b.ConsoleTail), "\n"); tail[len(tail)-1] != "" {
		row(w, "Last line:", strings.TrimSpace(tail[len(tail)-1]))
	}
}

func ended(j *typesv1.Job) bool {
	switch j.State {
	case typesv1.JobState_JOB_STATE_SUCCEEDED, typesv1.JobState_JOB_STATE_FAILED, typesv1.JobState_JOB_STATE_CANCELLED:
		return true
	default:
		return false
	}
}

func currentStep(j *typesv1.Job) string {
	for _, s := range j.Steps {
		if s.State == typesv1.JobState_JOB_STATE_IN_PROGRESS || s.State == typesv1.JobState_JOB_STATE_FAILED {
			return s.Id
		}
	}
	return "-"
}

// followJob prints the job's id first and, with wait, its progress until it ends. A failed job is an error.
func (a *app) followJob(ctx context.Context, j *typesv1.Job, wait bool) error {
	if !wait {
		return a.print(j, func(w io.Writer) { row(w, last(j.Name)) })
	}
	if a.format == "table" {
		fmt.Fprintln(a.out, last(j.Name))
	}
	client, err := a.jobService(ctx)
	if err != nil {
		return err
	}
	p := newProgress(a.err)
	final := j
	for attempt := 0; !ended(final); {
		stream, err := client.WatchJob(ctx, &schedulerv1.WatchJobRequest{Name: j.Name})
		for err == nil {
			var r *schedulerv1.WatchJobResponse
			if r, err = stream.Recv(); err == nil {
				attempt = 0
				final = r.Job
				p.show(final)
			}
		}
		if ended(final) {
			break
		}
		if ctx.Err() != nil {
			p.done()
			fmt.Fprintf(a.err, "stopped waiting; the job goes on: landfall jobs show %s --watch\n", last(j.Name))
			return errSilent
		}
		if attempt++; attempt > 10 && !errors.Is(err, io.EOF) {
			p.done()
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
	p.done()
	if a.format != "table" {
		if err := a.print(final, nil); err != nil {
			return err
		}
	}
	if final.State == typesv1.JobState_JOB_STATE_SUCCEEDED {
		return nil
	}
	if final.Error != nil {
		explainDetail(a.err, final.Error)
	} else {
		fmt.Fprintf(a.err, "job %s: %s\n", last(final.Name), label(final.State, "JOB_STATE_"))
	}
	return errSilent
}

// settled waits until done says so: a record follows the end of its job by a moment, and who waited for the job wants to
// go on from there.
func (a *app) settled(cmd *cobra.Command, done func(context.Context) (bool, error)) error {
	ctx, cancel := a.call(cmd)
	defer cancel()
	for {
		if ok, err := done(ctx); err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// endOfWatch makes an interrupted watch a normal end.
func endOfWatch(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// progress prints a job's steps and bytes: one line rewritten on a terminal, plain lines elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	steps    map[string]typesv1.JobState
	start    time.Time
	startAt  int64
	printed  time.Time
	open     bool
	shown    int64 // done bytes printed last, on plain lines
	last     *typesv1.Job
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, steps: map[string]typesv1.JobState{}}
	if f, ok := w.(*os.File); ok {
		p.terminal = term.IsTerminal(int(f.Fd()))
	}
	return p
}

func (p *progress) show(j *typesv1.Job) {
	if p.last != nil && proto.Equal(p.last, j) {
		return
	}
	p.last = j
	for _, s := range j.Steps {
		if p.steps[s.Id] == s.State || s.State == typesv1.JobState_JOB_STATE_NOT_STARTED {
			continue
		}
		p.steps[s.Id] = s.State
		p.done()
		line := fmt.Sprintf("%-22s %s", s.Id, label(s.State, "JOB_STATE_"))
		if s.Detail != "" {
			line += "  " + s.Detail
		}
		fmt.Fprintln(p.w, line)
	}
	if j.Progress.GetTotalBytes() > 0 && !ended(j) {
		p.bytes(j.Progress)
	}
}

func (p *progress) bytes(b *typesv1.JobProgress) {
	now := time.Now()
	if p.start.IsZero() {
		p.start, p.startAt = now, b.DoneBytes
	}
	if !p.terminal && (b.DoneBytes == p.shown || now.Sub(p.printed) < 2*time.Second && b.DoneBytes < b.TotalBytes) {
		return
	}
	p.printed, p.shown = now, b.DoneBytes
	line := fmt.Sprintf("  %3d%%  %s of %s", b.DoneBytes*100/b.TotalBytes, human(b.DoneBytes), human(b.TotalBytes))
	if secs := now.Sub(p.start).Seconds(); secs > 0.5 && b.DoneBytes > p.startAt {
		rate := float64(b.DoneBytes-p.startAt) / secs
		eta := time.Duration(float64(b.TotalBytes-b.DoneBytes) / rate * float64(time.Second)).Round(time.Second)
		line += fmt.Sprintf("  %s/s  ETA %s", human(int64(rate)), eta)
	}
	line += fmt.Sprintf("  (%s sent)", human(b.SentBytes))
	if p.terminal {
		fmt.Fprintf(p.w, "\r\033[K%s", line)
		p.open = true
		return
	}
	fmt.Fprintln(p.w, line)
}

// done ends an open line.
func (p *progress) done() {
	if p.open {
		fmt.Fprintln(p.w)
		p.open = false
	}
}

func (a *app) eventsCommand() *cobra.Command {
	var follow bool
	var vm string
	c := &cobra.Command{
		Use: "events", Short: "Print events", Args: cobra.NoArgs, Example: "  landfall events --follow\n  landfall events --vm web-01 -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := a.eventService(ctx)
			if err != nil {
				return err
			}
			req := &schedulerv1.WatchEventsRequest{Follow: follow}
			if vm != "" {
				req.Vm = a.vmName(vm)
			}
			stream, err := client.WatchEvents(ctx, req)
			if err != nil {
				return err
			}
			for {
				e, err := stream.Recv()
				if err != nil {
					return endOfWatch(ctx, err)
				}
				if err := a.print(e, func(w io.Writer) { row(w, stamp(e.Time), e.Type, e.Payload) }); err != nil {
					return err
				}
			}
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new events until interrupted")
	c.Flags().StringVar(&vm, "vm", "", "only events of this machine")
	return c
}
