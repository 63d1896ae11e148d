package azure

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/config"
)

func TestCodes(t *testing.T) {
	const again, maybe = 1, 2
	for _, tc := range []struct {
		status int
		code   string
		kind   error
		flags  int
	}{
		{401, "NoAuthenticationInformation", blobstore.ErrCredentials, 0},
		{401, "InvalidAuthenticationInfo", blobstore.ErrCredentials, 0},
		{400, "InvalidAuthenticationInfo", blobstore.ErrCredentials, 0},
		{401, "", blobstore.ErrCredentials, 0},
		{403, "AuthenticationFailed", blobstore.ErrCredentials, 0},
		{403, "KeyBasedAuthenticationNotPermitted", blobstore.ErrCredentials, 0},
		{403, "AuthorizationFailure", blobstore.ErrPermission, 0},
		{403, "AuthorizationPermissionMismatch", blobstore.ErrPermission, 0},
		{403, "AuthorizationProtocolMismatch", blobstore.ErrPermission, 0},
		{403, "AuthorizationResourceTypeMismatch", blobstore.ErrPermission, 0},
		{403, "AuthorizationServiceMismatch", blobstore.ErrPermission, 0},
		{403, "AuthorizationSourceIPMismatch", blobstore.ErrPermission, 0},
		{403, "InsufficientAccountPermissions", blobstore.ErrPermission, 0},
		{403, "UnauthorizedBlobOverwrite", blobstore.ErrPermission, 0},
		{403, "AccountIsDisabled", blobstore.ErrPermission, 0},
		{409, "PublicAccessNotPermitted", blobstore.ErrPermission, 0},
		{403, "", blobstore.ErrPermission, 0},
		{409, "BlobImmutableDueToPolicy", blobstore.ErrWriteOnce, 0},
		{409, "BlobImmutableDueToLegalHold", blobstore.ErrWriteOnce, 0},
		{404, "ContainerNotFound", blobstore.ErrNoContainer, 0},
		{409, "ContainerBeingDeleted", blobstore.ErrNoContainer, 0},
		{404, "BlobNotFound", blobstore.ErrNotFound, 0},
		{404, "ResourceNotFound", blobstore.ErrNotFound, 0},
		{404, "", blobstore.ErrNotFound, 0},
		{409, "BlobAlreadyExists", blobstore.ErrExists, 0},
		{412, "ConditionNotMet", blobstore.ErrConditionFailed, 0},
		{412, "TargetConditionNotMet", blobstore.ErrConditionFailed, 0},
		{412, "SequenceNumberConditionNotMet", blobstore.ErrConditionFailed, 0},
		{412, "", blobstore.ErrConditionFailed, 0},
		{412, "LeaseIdMissing", blobstore.ErrLeaseConflict, 0},
		{412, "LeaseIdMismatchWithBlobOperation", blobstore.ErrLeaseConflict, 0},
		{409, "LeaseIdMismatchWithLeaseOperation", blobstore.ErrLeaseConflict, 0},
		{412, "LeaseNotPresentWithBlobOperation", blobstore.ErrLeaseConflict, 0},
		{409, "LeaseNotPresentWithLeaseOperation", blobstore.ErrLeaseConflict, 0},
		{409, "LeaseAlreadyPresent", blobstore.ErrLeaseConflict, 0},
		{409, "LeaseIsBrokenAndCannotBeRenewed", blobstore.ErrLeaseConflict, 0},
		{409, "LeaseIsBreakingAndCannotBeAcquired", blobstore.ErrLeaseConflict, 0},
		{412, "LeaseLost", blobstore.ErrLeaseConflict, 0},
		{409, "InvalidBlobType", blobstore.ErrInvalid, 0},
		{416, "InvalidRange", blobstore.ErrInvalid, 0},
		{416, "InvalidPageRange", blobstore.ErrInvalid, 0},
		{416, "", blobstore.ErrInvalid, 0},
		{413, "RequestBodyTooLarge", blobstore.ErrInvalid, 0},
		{400, "OutOfRangeInput", blobstore.ErrInvalid, 0},
		{400, "AccountRequiresHttps", blobstore.ErrInvalid, 0},
		{409, "SnapshotCountExceeded", blobstore.ErrFull, 0},
		{409, "AccountCapacityExceeded", blobstore.ErrFull, 0},
		{507, "", blobstore.ErrFull, 0},
		{400, "Md5Mismatch", nil, again},
		{400, "Crc64Mismatch", nil, again},
		{409, "SnapshotOperationRateExceeded", nil, again},
		{409, "AccountBeingCreated", nil, again},
		{408, "", nil, again | maybe},
		{429, "", nil, again},
		{500, "InternalError", nil, again | maybe},
		{500, "OperationTimedOut", nil, again | maybe},
		{500, "FeatureNotSupported", nil, 0},
		{501, "APINotImplemented", nil, 0},
		{502, "", nil, again | maybe},
		{503, "ServerBusy", nil, again | maybe},
		{504, "", nil, again | maybe},
		{409, "PendingCopyOperation", nil, 0},
	} {
		v := judgeAnswer(tc.status, tc.code, nil, time.Now())
		name := fmt.Sprint(tc.status, " ", tc.code)
		for _, s := range []error{
			blobstore.ErrNotFound, blobstore.ErrExists, blobstore.ErrConditionFailed, blobstore.ErrLeaseConflict, blobstore.ErrInvalid,
			blobstore.ErrFull, blobstore.ErrCredentials, blobstore.ErrPermission, blobstore.ErrWriteOnce,
		} {
			require.Equal(t, tc.kind != nil && errors.Is(tc.kind, s), errors.Is(v.err, s), "%s: %v", name, s)
		}
		require.Equal(t, errors.Is(tc.kind, blobstore.ErrNoContainer), errors.Is(v.err, blobstore.ErrNoContainer), name)
		require.Equal(t, tc.flags&again != 0, v.again, name)
		require.Equal(t, tc.flags&maybe != 0, v.maybe, name)
		require.Contains(t, v.err.Error(), fmt.Sprint(tc.status), name)
		var e *ServiceError
		require.ErrorAs(t, v.err, &e)
		require.Equal(t, tc.code, e.Code)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "3": 3 * time.Second, "-1": 0, "x": 0, "99999": maxRetryAfter,
		"Sun, 01 Mar 2026 12:00:07 GMT": 7 * time.Second, "Sun, 01 Mar 2026 11:00:00 GMT": 0,
	} {
		require.Equal(t, want, retryAfter(http.Header{"Retry-After": {value}}, now), value)
	}
}

// TestNoSecrets: neither answers nor broken connections put a signature into a text.
func TestNoSecrets(t *testing.T) {
	const secret = "c2VjcmV0c2ln"
	s, err := Open("http://127.0.0.1:1/acct", Settings{SAS: config.NewSecret("sv=2026-01-01&sp=r&sig=" + secret), RetryFor: 20 * time.Millisecond}, Options{Backoff: time.Millisecond})
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Container("abc").Stat(t.Context(), "x", "")
	require.ErrorContains(t, err, "no answer from storage")
	require.NotContains(t, err.Error(), secret)
	var op *net.OpError
	require.ErrorAs(t, err, &op)

	srv := fake(t, azurefake.Options{})
	s, err = Open(srv.URL(), Settings{SAS: config.NewSecret("sv=2026-01-01&sp=r&sig=" + secret)}, Options{})
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Container("abc").Stat(t.Context(), "x", "")
	require.ErrorIs(t, err, blobstore.ErrCredentials)
	require.NotContains(t, err.Error(), secret)
	require.NotContains(t, fmt.Sprintf("%+v", s.settings), secret)
	_, err = Open("https://acct.blob.core.windows.net?sig="+secret, Settings{}, Options{})
	require.ErrorContains(t, err, "no credentials and no query")
	require.NotContains(t, err.Error(), secret)
}

// TestClockOff: a signed request an hour off is refused, and the text says whose clock is off by how much.
func TestClockOff(t *testing.T) {
	for ahead, want := range map[time.Duration]string{time.Hour: "clock is 1h0m", -time.Hour: "behind the storage's"} {
		srv := fake(t, azurefake.Options{Now: func() time.Time { return time.Now().Add(-ahead) }})
		s := open(t, connString(srv.ConnectionString()), Options{})
		err := s.CreateContainer(t.Context(), "abc")
		require.ErrorIs(t, err, blobstore.ErrCredentials)
		require.ErrorIs(t, err, blobstore.ErrClockSkew)
		require.ErrorContains(t, err, want)
		at, err := s.Now(t.Context())
		require.NoError(t, err, "storage time is known from the refusal")
		require.WithinDuration(t, time.Now().Add(-ahead), at, 5*time.Second)
	}
	srv := fake(t, azurefake.Options{})
	text := strings.Replace(srv.ConnectionString(), srv.Key, "d3Jvbmc=", 1)
	err := open(t, connString(text), Options{}).CreateContainer(t.Context(), "abc")
	require.ErrorIs(t, err, blobstore.ErrCredentials)
	require.NotErrorIs(t, err, blobstore.ErrClockSkew)
	require.NotContains(t, err.Error(), "clock")
}

// TestRefusalsOfTheFake: a policy, a full account, a missing container, each by name.
func TestRefusalsOfTheFake(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	require.NoError(t, s.CreateContainer(ctx, "lfj-x"))
	c := s.Container("lfj-x")
	put := func(name, text string, cond blobstore.Conditions) error {
		_, err := c.Put(ctx, name, strings.NewReader(text), int64(len(text)), cond)
		return err
	}
	require.NoError(t, put("a", "1", blobstore.Conditions{CreateOnly: true}))

	p, err := s.ContainerProtection(ctx, "lfj-x")
	require.NoError(t, err)
	require.Zero(t, p)
	_, err = s.ContainerProtection(ctx, "nowhere")
	require.ErrorIs(t, err, blobstore.ErrNoContainer)
	err = s.ProtectContainer(ctx, "lfj-x", blobstore.Protection{WriteOnce: 49 * time.Hour, Locked: true})
	require.ErrorIs(t, err, blobstore.ErrPermission)
	require.ErrorContains(t, err, "--container-name lfj-x --period 3")
	require.True(t, srv.SetWriteOnce("lfj-x", azurefake.WriteOnce{Retention: time.Hour}))
	p, err = s.ContainerProtection(ctx, "lfj-x")
	require.NoError(t, err)
	require.Equal(t, blobstore.Protection{WriteOnce: 1}, p)
	require.ErrorIs(t, put("a", "2", blobstore.Conditions{}), blobstore.ErrWriteOnce)
	require.ErrorIs(t, c.Delete(ctx, "a", blobstore.Conditions{}), blobstore.ErrWriteOnce)
	require.ErrorIs(t, put("a", "2", blobstore.Conditions{CreateOnly: true}), blobstore.ErrExists)
	require.NoError(t, put("b", "new ones are welcome", blobstore.Conditions{CreateOnly: true}))
	require.True(t, srv.SetWriteOnce("lfj-x", azurefake.WriteOnce{LegalHold: true}))
	p, err = s.ContainerProtection(ctx, "lfj-x")
	require.NoError(t, err)
	require.True(t, p.LegalHold)
	require.ErrorIs(t, c.Delete(ctx, "a", blobstore.Conditions{}), blobstore.ErrWriteOnce)
	require.NoError(t, s.ProtectContainer(ctx, "lfj-x", blobstore.Protection{LegalHold: true}))

	srv.SetFull(true)
	require.ErrorIs(t, put("c", strings.Repeat("x", 1000), blobstore.Conditions{CreateOnly: true}), blobstore.ErrFull)
	_, err = s.Container("nowhere").Stat(ctx, "x", "")
	require.ErrorIs(t, err, blobstore.ErrNotFound)
	_, _, err = s.Container("nowhere").Get(ctx, "x", 0, -1)
	require.ErrorIs(t, err, blobstore.ErrNoContainer)
}

// TestCreateOnlyUnderAPolicyOrARight: who may only create is refused by other words than "exists".
func TestCreateOnlyUnderAPolicyOrARight(t *testing.T) {
	put := func(c blobstore.Container, text string) error {
		_, err := c.Put(t.Context(), "a", strings.NewReader(text), int64(len(text)), blobstore.Conditions{CreateOnly: true})
		return err
	}
	srv := fake(t, azurefake.Options{ImmutableFirst: true})
	owner := open(t, connString(srv.ConnectionString()), Options{})
	require.NoError(t, owner.CreateContainer(t.Context(), "lfj-x"))
	require.NoError(t, put(owner.Container("lfj-x"), "first"))
	require.True(t, srv.SetWriteOnce("lfj-x", azurefake.WriteOnce{Retention: time.Hour}))
	require.ErrorIs(t, put(owner.Container("lfj-x"), "second"), blobstore.ErrExists)
	require.NotErrorIs(t, put(owner.Container("lfj-x"), "second"), blobstore.ErrWriteOnce)

	// A SAS to read, list and create, signed by the service that it is for.
	sas := signedSAS(t, owner, "rlc")
	ship, err := Open(srv.URL(), Settings{SAS: config.NewSecret(sas)}, Options{Backoff: time.Millisecond})
	require.NoError(t, err)
	defer ship.Close()
	c := ship.Container("lfj-x")
	require.ErrorIs(t, put(c, "third"), blobstore.ErrExists)
	_, err = c.Put(t.Context(), "new", strings.NewReader("x"), 1, blobstore.Conditions{CreateOnly: true})
	require.NoError(t, err)
	require.ErrorIs(t, c.Delete(t.Context(), "new", blobstore.Conditions{}), blobstore.ErrPermission)
	_, err = c.Put(t.Context(), "new", strings.NewReader("y"), 1, blobstore.Conditions{})
	require.ErrorIs(t, err, blobstore.ErrPermission)
	require.NoError(t, ship.CreateContainer(t.Context(), "lfj-x"), "it is there")
	_, err = ship.Now(t.Context())
	require.NoError(t, err, "storage time needs no right")
}

func TestErrClosed(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s := open(t, connString(srv.ConnectionString()), Options{})
	require.NoError(t, s.Close())
	_, err := s.Container("abc").Stat(t.Context(), "x", "")
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, s.CreateContainer(t.Context(), "abc"), ErrClosed)
	_, err = s.Now(t.Context())
	require.ErrorIs(t, err, ErrClosed)
}

func TestTransportTexts(t *testing.T) {
	err := transport(&url.Error{Op: "Put", URL: "https://x?sig=secret", Err: context.DeadlineExceeded})
	require.NotContains(t, err.Error(), "secret")
	require.True(t, unsent(&net.OpError{Op: "dial", Err: errors.New("x")}))
	require.False(t, unsent(reset()))
}
