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
)

// journalVersion is the version of a step record (docs/formats/failover-journal.md).
const journalVersion = 1

// maxRecord bounds a step record, in bytes.
const maxRecord = 1 << 20

// stepRecord is <failover>/steps/<step>.json in container lff-<lineage>: its existence says that the step is done.
type stepRecord struct {
	V        int             `json:"v"`
	Failover string          `json:"failover"`
	Step     string          `json:"step"`
	Time     time.Time       `json:"time"`
	Result   json.RawMessage `json:"result,omitempty"`
}

// journal is the step journal of one failover.
type journal struct {
	container blobstore.Container
	failover  string
	now       func() time.Time
}

func newJournal(store blobstore.Store, lineage replica.Lineage, failover string, now func() time.Time) *journal {
	return &journal{container: store.Container(lineage.FailoverContainer()), failover: failover, now: now}
}

func (j *journal) name(step string) string { return j.failover + "/steps/" + step + ".json" }

// done reads a step's result into result; false when the step is not done.
func (j *journal) done(ctx context.Context, step string, result any) (bool, error) {
	body, _, err := j.container.Get(ctx, j.name(step), 0, -1)
	if errors.Is(err, blobstore.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read step %s: %w", step, err)
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, maxRecord))
	if err != nil {
		return false, fmt.Errorf("read step %s: %w", step, err)
	}
	var r stepRecord
	if err := json.Unmarshal(raw, &r); err != nil {
		return false, fmt.Errorf("step %s: %w", step, err)
	}
	if r.V != journalVersion || r.Failover != j.failover || r.Step != step {
		return false, fmt.Errorf("step %s: record is of version %d, failover %q, step %q", step, r.V, r.Failover, r.Step)
	}
	if result == nil || len(r.Result) == 0 {
		return true, nil
	}
	return true, json.Unmarshal(r.Result, result)
}

// finish writes that a step is done. A repeat is success: the first result stands.
func (j *journal) finish(ctx context.Context, step string, result any) error {
	r := stepRecord{V: journalVersion, Failover: j.failover, Step: step, Time: j.now().UTC()}
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
