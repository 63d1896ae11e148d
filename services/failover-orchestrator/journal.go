package failoverorchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// journalVersion is the version of a step record (docs/formats/failover-journal.md).
const journalVersion = 1

// maxRecord bounds a step record, in bytes.
const maxRecord = 1 << 20

// stepRecord is steps/<step>.json of a failover, or of one of its jobs, in container lff-<lineage>: its existence says
// that the step is done.
type stepRecord struct {
	V        int             `json:"v"`
	Failover string          `json:"failover"`
	Job      string          `json:"job,omitempty"`
	Step     string          `json:"step"`
	Time     time.Time       `json:"time"`
	Detail   string          `json:"detail,omitempty"`
	Skipped  bool            `json:"skipped,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
}

// state is how the step ended.
func (r *stepRecord) state() typesv1.JobState {
	if r.Skipped {
		return typesv1.JobState_JOB_STATE_SKIPPED
	}
	return typesv1.JobState_JOB_STATE_SUCCEEDED
}

// journal is the step journal of one failover, or of one job of it.
type journal struct {
	container     blobstore.Container
	failover, job string
	now           func() time.Time
}

func newJournal(store blobstore.Store, lineage replica.Lineage, failover, job string, now func() time.Time) *journal {
	return &journal{container: store.Container(lineage.FailoverContainer()), failover: failover, job: job, now: now}
}

// journalOf is the journal of the steps that bring a failover's copy up. A test has one; another failover has one for
// each job, because it may be started again.
func (s *Service) journalOf(lineage replica.Lineage, f *failoverv1.Failover) *journal {
	if isTest(f) {
		return newJournal(s.deps.Store, lineage, lastPart(f.Name), "", s.deps.Clock)
	}
	return newJournal(s.deps.Store, lineage, lastPart(f.Name), lastPart(f.Job), s.deps.Clock)
}

func (j *journal) name(step string) string {
	folder := j.failover
	if j.job != "" {
		folder += "/jobs/" + j.job
	}
	return folder + "/steps/" + step + ".json"
}

// done reads a step's result into result; false when the step is not done.
func (j *journal) done(ctx context.Context, step string, result any) (bool, error) {
	r, err := j.read(ctx, step, result)
	return r != nil, err
}

// read reads the record of a step, and its result into result; nil when the step is not done.
func (j *journal) read(ctx context.Context, step string, result any) (*stepRecord, error) {
	body, _, err := j.container.Get(ctx, j.name(step), 0, -1)
	if errors.Is(err, blobstore.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read step %s: %w", step, err)
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, maxRecord))
	if err != nil {
		return nil, fmt.Errorf("read step %s: %w", step, err)
	}
	r := &stepRecord{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("step %s: %w", step, err)
	}
	if r.V != journalVersion || r.Failover != j.failover || r.Job != j.job || r.Step != step {
		return nil, fmt.Errorf("step %s: record is of version %d, failover %q, job %q, step %q", step, r.V, r.Failover, r.Job, r.Step)
	}
	if result == nil || len(r.Result) == 0 {
		return r, nil
	}
	if err := json.Unmarshal(r.Result, result); err != nil {
		return nil, fmt.Errorf("result of step %s: %w", step, err)
	}
	return r, nil
}

// decide settles a question once for all: of several answers, by whatever processes, the first one stands, and all hear
// it.
func (j *journal) decide(ctx context.Context, question, answer string) (string, error) {
	if err := j.finish(ctx, &stepRecord{Step: question}, answer); err != nil {
		return "", err
	}
	var stands string
	switch ok, err := j.done(ctx, question, &stands); {
	case err != nil:
		return "", err
	case !ok:
		return "", fmt.Errorf("read %s back: nothing is there", question)
	}
	return stands, nil
}

// finish writes that a step is done. A repeat is success: the first result stands.
func (j *journal) finish(ctx context.Context, r *stepRecord, result any) error {
	step := r.Step
	r.V, r.Failover, r.Job, r.Time = journalVersion, j.failover, j.job, j.now().UTC()
	if result != nil {
		raw, err := json.Marshal(result)
		if err != nil {
			return fmt.Errorf("encode step %s: %w", step, err)
		}
		r.Result = raw
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode step %s: %w", step, err)
	}
	_, err = j.container.Put(ctx, j.name(step), bytes.NewReader(raw), int64(len(raw)), blobstore.Conditions{CreateOnly: true})
	if err != nil && !errors.Is(err, blobstore.ErrExists) {
		return fmt.Errorf("write step %s: %w", step, err)
	}
	return nil
}
