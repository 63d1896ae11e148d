package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/failpoint"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// step is one piece of work of a job.
type step struct {
	id string
	// do does it, and is repeated from its start after a kill until the journal has it. detail is one line for people.
	// An error of type notNeeded ends it as skipped.
	do func(ctx context.Context) (result any, detail string, err error)
	// into receives a result that the journal has; nil where later steps need none.
	into any
}

// notNeeded ends a step that has nothing to do; it says why.
type notNeeded struct{ why string }

// Error implements error.
func (n notNeeded) Error() string { return n.why }

func skip(format string, args ...any) error { return notNeeded{fmt.Sprintf(format, args...)} }

// final marks an error that another attempt would only repeat, whatever its reason says.
type final struct{ error }

// Unwrap returns what was marked.
func (f final) Unwrap() error { return f.error }

// perform does steps one after the other. Those that the journal has are not repeated.
func (s *Service) perform(ctx context.Context, job string, j *journal, steps ...step) error {
	for _, st := range steps {
		if err := s.performOne(ctx, job, j, st); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) performOne(ctx context.Context, job string, j *journal, st step) error {
	have, err := j.read(ctx, st.id, st.into)
	if err != nil {
		return storeError(err)
	}
	if have != nil {
		return storeError(s.step(ctx, job, st.id, have.state(), have.Detail))
	}
	if err := s.step(ctx, job, st.id, typesv1.JobState_JOB_STATE_IN_PROGRESS, ""); err != nil {
		return storeError(err)
	}
	if err := failpoint.Hit("failover-orchestrator/before-" + st.id); err != nil {
		return err
	}
	done, err := s.effect(ctx, j, st)
	if err != nil {
		return err
	}
	if err := failpoint.Hit("failover-orchestrator/after-" + st.id); err != nil {
		return err
	}
	return storeError(s.step(ctx, job, st.id, done.state(), done.Detail))
}

// effect does one step and writes it to the journal, in its own span.
func (s *Service) effect(ctx context.Context, j *journal, st step) (*stepRecord, error) {
	ctx, span := s.tracer.Start(ctx, st.id)
	defer span.End()
	result, detail, err := st.do(ctx)
	var unneeded notNeeded
	skipped := errors.As(err, &unneeded)
	if skipped {
		detail, err = unneeded.why, nil
	}
	if err == nil && ctx.Err() != nil { // whoever holds the lease now decides
		err = ctx.Err()
	}
	if err != nil {
		span.RecordError(err)
		return nil, err
	}
	done := &stepRecord{Step: st.id, Detail: detail, Skipped: skipped}
	if err := j.finish(ctx, done, result); err != nil {
		span.RecordError(err)
		return nil, storeError(err)
	}
	return done, nil
}
