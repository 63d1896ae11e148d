package errcat_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var update = flag.Bool("update", false, "write docs/errors.md anew")

const (
	pointNotFound = typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND
	vmNotFound    = typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND
	unspecified   = typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED
)

// overWire sends a status through its bytes, as a connection does.
func overWire(t *testing.T, err error) error {
	t.Helper()
	raw, merr := proto.Marshal(errcat.ToStatus(err).Proto())
	require.NoError(t, merr)
	p := errcat.ToStatus(nil).Proto()
	require.NoError(t, proto.Unmarshal(raw, p))
	return errcat.FromError(status.FromProto(p).Err())
}

func TestEveryReasonHasAnEntry(t *testing.T) {
	for number, name := range typesv1.ErrorReason_name {
		r := typesv1.ErrorReason(number)
		entry, ok := errcat.Lookup(r)
		if r == unspecified {
			require.False(t, ok)
			continue
		}
		require.True(t, ok, name)
		require.NotEqual(t, codes.OK, entry.Code, name)
		for _, text := range []string{entry.Cause, entry.Action} {
			require.True(t, strings.HasSuffix(text, "."), "%s: sentences end with a full stop: %q", name, text)
		}
		require.Equal(t, entry.RetryAfter > 0, entry.Recoverable, "%s: a passing error says when to come back", name)
		back, ok := errcat.Parse(errcat.Code(r))
		require.True(t, ok)
		require.Equal(t, r, back)
	}
}

func TestPage(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "errors.md")
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(errcat.Page()), 0o644))
	}
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(errcat.Page(), string(got)), "run: go test ./libs/errcat -update")
}

func TestRoundTripOfEveryReason(t *testing.T) {
	for number := range typesv1.ErrorReason_name {
		r := typesv1.ErrorReason(number)
		if r == unspecified {
			continue
		}
		sent := errcat.New(r, "point %d of vm-1", 7).With("vm", "vm-1").With("point", "7")
		got := overWire(t, fmt.Errorf("read: %w", sent))
		require.ErrorIs(t, got, errcat.New(r, ""))
		require.True(t, errcat.Is(got, r))
		require.Equal(t, "read: point 7 of vm-1", got.Error())
		var e *errcat.Error
		require.ErrorAs(t, got, &e)
		require.Equal(t, map[string]string{"vm": "vm-1", "point": "7"}, e.Meta)
		require.Equal(t, sent.Recoverable(), e.Recoverable())
		require.Equal(t, sent.Code(), e.Code())
		require.Equal(t, errcat.Explain(fmt.Errorf("read: %w", sent)), errcat.Explain(got))
		require.Equal(t, got.Error(), overWire(t, got).Error(), "a second hop changes nothing")
	}
}

func TestIs(t *testing.T) {
	err := errcat.Wrap(pointNotFound, fs.ErrNotExist, "open %s", "log/7.json")
	require.EqualError(t, err, "open log/7.json: file does not exist")
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorIs(t, err, errcat.New(pointNotFound, ""))
	require.NotErrorIs(t, err, errcat.New(vmNotFound, ""))
	require.False(t, errcat.Is(nil, unspecified))
	require.NoError(t, errcat.Wrap(pointNotFound, nil, "nothing"))
	outer := errcat.Wrap(vmNotFound, err, "recover")
	require.True(t, errcat.Is(outer, vmNotFound))
	require.False(t, errcat.Is(outer, pointNotFound), "the outermost reason counts")
	require.ErrorIs(t, outer, errcat.New(pointNotFound, ""), "errors.Is sees the whole chain")
	one, two := errcat.FromError(status.Error(codes.NotFound, "x")), errcat.FromError(status.Error(codes.NotFound, "x"))
	require.NotErrorIs(t, one, two, "two errors without a reason are not the same")
}

func TestContextErrors(t *testing.T) {
	for _, tt := range []struct {
		err    error
		code   codes.Code
		reason typesv1.ErrorReason
	}{
		{context.Canceled, codes.Canceled, typesv1.ErrorReason_ERROR_REASON_CANCELLED},
		{context.DeadlineExceeded, codes.DeadlineExceeded, typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED},
	} {
		wrapped := fmt.Errorf("put segment: %w", tt.err)
		require.Equal(t, tt.code, errcat.ToStatus(wrapped).Code())
		require.Equal(t, tt.reason, errcat.Reason(wrapped))
		got := overWire(t, wrapped)
		require.ErrorIs(t, got, tt.err)
		require.Equal(t, wrapped.Error(), got.Error())
		require.ErrorIs(t, errcat.FromError(status.FromContextError(tt.err).Err()), tt.err, "made by gRPC itself")
	}
	storage := typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_CANCELLED, errcat.Reason(errcat.Wrap(storage, context.Canceled, "put")))
	require.Equal(t, storage, errcat.Reason(errcat.Wrap(storage, context.DeadlineExceeded, "put")))
}

func TestErrorsWithoutReason(t *testing.T) {
	st := errcat.ToStatus(errors.New("index out of range"))
	require.Equal(t, codes.Internal, st.Code())
	require.True(t, errcat.Is(errcat.FromStatus(st), typesv1.ErrorReason_ERROR_REASON_INTERNAL))
	require.Equal(t, codes.NotFound, errcat.ToStatus(status.Error(codes.NotFound, "x")).Code(), "a status passes on")
	require.Equal(t, codes.Internal, errcat.ToStatus(status.Error(codes.Unknown, "x")).Code())
	require.True(t, errcat.Is(errcat.FromError(status.Error(codes.Unavailable, "refused")), typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE))
	plain := errors.New("plain")
	require.Same(t, plain, errcat.FromError(plain))
	require.NoError(t, errcat.FromError(nil))
	require.Equal(t, codes.OK, errcat.ToStatus(nil).Code())
}

func TestUnknownReasonKeepsItsAdvice(t *testing.T) {
	st, err := status.New(codes.FailedPrecondition, "the moon is full").WithDetails(
		&errdetails.ErrorInfo{Reason: "MOON_FULL", Domain: errcat.Domain},
		&errdetails.LocalizedMessage{Locale: "en", Message: "The month.\nWait."})
	require.NoError(t, err)
	for range 2 { // a second hop must not lose it either
		got := errcat.FromStatus(st)
		require.Equal(t, "what happened: the moon is full\nreason:        MOON_FULL\nlikely cause:  The month.\nwhat to do:    Wait.", errcat.Explain(got))
		st = errcat.ToStatus(got)
		require.Equal(t, codes.FailedPrecondition, st.Code())
	}
}

func TestDetails(t *testing.T) {
	find := func(err error) (retry *errdetails.RetryInfo, pre *errdetails.PreconditionFailure, bad *errdetails.BadRequest) {
		for _, d := range errcat.ToStatus(err).Details() {
			switch d := d.(type) {
			case *errdetails.RetryInfo:
				retry = d
			case *errdetails.PreconditionFailure:
				pre = d
			case *errdetails.BadRequest:
				bad = d
			}
		}
		return retry, pre, bad
	}
	retry, pre, bad := find(errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE, "503").After(7 * time.Second))
	require.Equal(t, 7*time.Second, retry.GetRetryDelay().AsDuration())
	require.Nil(t, pre)
	require.Nil(t, bad)
	retry, pre, _ = find(errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "vm-1 is DELTA").With("resource", "sites/a/vms/vm-1"))
	require.Nil(t, retry)
	require.Equal(t, "sites/a/vms/vm-1", pre.GetViolations()[0].GetSubject())
	invalid := errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "two problems")
	invalid.Fields = []errcat.Field{{Path: "a.b", Rule: "string.min_len", Message: "too short"}}
	_, _, bad = find(invalid)
	require.Equal(t, "a.b", bad.GetFieldViolations()[0].GetField())
	require.Contains(t, errcat.Explain(overWire(t, invalid)), "a.b: too short")
}

func TestStatusIsBounded(t *testing.T) {
	e := errcat.New(vmNotFound, "%s", strings.Repeat("é", 1<<20))
	for i := range 1000 {
		e.Fields = append(e.Fields, errcat.Field{Path: "f", Message: strings.Repeat("m", 1000)})
		e = e.With(fmt.Sprintf("k%d", i), strings.Repeat("v", 1000))
	}
	raw, err := proto.Marshal(errcat.ToStatus(e).Proto())
	require.NoError(t, err)
	require.Less(t, len(raw), 16<<10)
}
