package azure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// ErrClosed is returned by calls on a closed store.
var ErrClosed = errors.New("azure store is closed")

// ServiceError is what the service (or the identity provider) answered. It unwraps to the blobstore sentinel that it means,
// if it means one.
type ServiceError struct {
	// Status is the HTTP status, Code the service's word, such as BlobAlreadyExists; "" when it said none.
	Status int
	Code   string
	// RequestID is what the service's support asks for.
	RequestID string
	// Hint says what to do, or "".
	Hint string
	// Kind is a sentinel of package blobstore, or nil.
	Kind error

	retryAfter time.Duration
}

// Error is one line without addresses: those of a SAS are secrets.
func (e *ServiceError) Error() string {
	var b strings.Builder
	if e.Kind != nil {
		b.WriteString(e.Kind.Error())
		b.WriteString(": ")
	}
	fmt.Fprintf(&b, "storage answered %d", e.Status)
	if e.Code != "" {
		b.WriteString(" " + e.Code)
	}
	if e.Hint != "" {
		b.WriteString(": " + e.Hint)
	}
	if e.RequestID != "" {
		b.WriteString(" (request " + e.RequestID + ")")
	}
	return b.String()
}

// Unwrap returns Kind.
func (e *ServiceError) Unwrap() error { return e.Kind }

// kinds maps the service's codes; codes that start with Lease are ErrLeaseConflict.
var kinds = map[bloberror.Code]error{
	bloberror.AuthenticationFailed:        blobstore.ErrCredentials,
	bloberror.InvalidAuthenticationInfo:   blobstore.ErrCredentials,
	bloberror.NoAuthenticationInformation: blobstore.ErrCredentials,
	"KeyBasedAuthenticationNotPermitted":  blobstore.ErrCredentials,

	bloberror.AuthorizationFailure:              blobstore.ErrPermission,
	bloberror.AuthorizationPermissionMismatch:   blobstore.ErrPermission,
	bloberror.AuthorizationProtocolMismatch:     blobstore.ErrPermission,
	bloberror.AuthorizationResourceTypeMismatch: blobstore.ErrPermission,
	bloberror.AuthorizationServiceMismatch:      blobstore.ErrPermission,
	bloberror.AuthorizationSourceIPMismatch:     blobstore.ErrPermission,
	bloberror.InsufficientAccountPermissions:    blobstore.ErrPermission,
	bloberror.AccountIsDisabled:                 blobstore.ErrPermission,
	bloberror.ContainerDisabled:                 blobstore.ErrPermission,
	bloberror.UnauthorizedBlobOverwrite:         blobstore.ErrPermission,
	"PublicAccessNotPermitted":                  blobstore.ErrPermission,

	bloberror.BlobImmutableDueToPolicy: blobstore.ErrWriteOnce,
	"BlobImmutableDueToLegalHold":      blobstore.ErrWriteOnce,

	bloberror.ContainerNotFound:     blobstore.ErrNoContainer,
	bloberror.ContainerBeingDeleted: blobstore.ErrNoContainer,
	bloberror.BlobNotFound:          blobstore.ErrNotFound,
	bloberror.ResourceNotFound:      blobstore.ErrNotFound,

	bloberror.BlobAlreadyExists:     blobstore.ErrExists,
	bloberror.ResourceAlreadyExists: blobstore.ErrExists,

	bloberror.ConditionNotMet:               blobstore.ErrConditionFailed,
	bloberror.TargetConditionNotMet:         blobstore.ErrConditionFailed,
	bloberror.SequenceNumberConditionNotMet: blobstore.ErrConditionFailed,

	bloberror.InfiniteLeaseDurationRequired: blobstore.ErrLeaseConflict,

	bloberror.InvalidBlobType:                 blobstore.ErrInvalid,
	"BlobTypeNotSupported":                    blobstore.ErrInvalid,
	bloberror.InvalidRange:                    blobstore.ErrInvalid,
	bloberror.InvalidPageRange:                blobstore.ErrInvalid,
	bloberror.RequestBodyTooLarge:             blobstore.ErrInvalid,
	bloberror.SequenceNumberIncrementTooLarge: blobstore.ErrInvalid,
	bloberror.BlockCountExceedsLimit:          blobstore.ErrInvalid,

	// The service's own list has no code for an account that is full; these are what other services of it say, and 507 is
	// what the protocol has.
	bloberror.SnapshotCountExceeded:       blobstore.ErrFull,
	"AccountCapacityExceeded":             blobstore.ErrFull,
	"AccountQuotaExceeded":                blobstore.ErrFull,
	"InsufficientStorage":                 blobstore.ErrFull,
	"StorageAccountCapacityLimitExceeded": blobstore.ErrFull,
}

// hints say what to do.
var hints = map[bloberror.Code]string{
	bloberror.AuthenticationFailed:            "wrong or expired key, signature or token",
	"KeyBasedAuthenticationNotPermitted":      "the account accepts no shared keys; use an identity",
	bloberror.AuthorizationFailure:            "refused by the account's firewall, or this kind of call is not allowed to this identity",
	bloberror.AuthorizationPermissionMismatch: "the identity or SAS lacks the right for this operation",
	bloberror.AuthorizationSourceIPMismatch:   "the SAS is not valid from this address",
	bloberror.AuthorizationProtocolMismatch:   "the SAS is valid over https only",
	bloberror.InsufficientAccountPermissions:  "the account is read-only, or the identity lacks the right",
	bloberror.AccountIsDisabled:               "the account is disabled",
	bloberror.BlobImmutableDueToPolicy:        "a retention policy of the container forbids it until the blob is old enough",
	"BlobImmutableDueToLegalHold":             "a legal hold is on the container",
	"AccountRequiresHttps":                    "the account takes https only",
}

// retriable are refusals that a later try may not meet.
var retriable = map[bloberror.Code]bool{
	bloberror.MD5Mismatch: true, bloberror.CRC64Mismatch: true, // damaged on the way
	bloberror.SnapshotOperationRateExceeded: true, bloberror.AccountBeingCreated: true, bloberror.SystemInUse: true,
}

// featureMissing is an emulator's word for what it has not got.
const featureMissing = "FeatureNotSupported"

// verdict is what an error means for a further try.
type verdict struct {
	err      error // translated
	again    bool  // worth another try
	maybe    bool  // the service may have done it
	throttle bool  // the service is asked too much
	after    time.Duration
}

// judge translates an error of the SDK. local is this machine's clock.
func judge(err error, local time.Time) verdict {
	var re *azcore.ResponseError
	if errors.As(err, &re) {
		return judgeAnswer(re.StatusCode, re.ErrorCode, re.RawResponse, local)
	}
	var auth *azidentity.AuthenticationFailedError
	if errors.As(err, &auth) {
		if r := auth.RawResponse; r != nil && r.StatusCode < 500 && r.StatusCode != http.StatusTooManyRequests {
			hint := "the identity provider refused the credentials"
			if code := aadCode.FindString(auth.Error()); code != "" {
				hint += ", " + code
			}
			e := &ServiceError{Status: r.StatusCode, Code: "AuthenticationFailed", Hint: hint, Kind: blobstore.ErrCredentials}
			if off := skew(r, local); off != "" {
				e.Kind, e.Hint = blobstore.ErrClockSkew, hint+off
			}
			return verdict{err: e}
		}
		return verdict{err: fmt.Errorf("ask the identity provider: %w", transport(err)), again: true}
	}
	if errors.Is(err, errShortAnswer) || errors.Is(err, errDamaged) {
		return verdict{err: err, again: true}
	}
	if errors.Is(err, blobstore.ErrInvalid) {
		return verdict{err: err}
	}
	if s := err.Error(); strings.Contains(s, "not permitted for non-TLS") {
		return verdict{err: fmt.Errorf("%w: a token cannot be sent over plain http", blobstore.ErrCredentials)}
	}
	var unavailable interface{ NonRetriable() }
	if errors.As(err, &unavailable) {
		// azidentity: no identity is offered here, or it is not configured.
		return verdict{err: fmt.Errorf("%w: %w", blobstore.ErrCredentials, transport(err))}
	}
	return verdict{err: transport(err), again: true, maybe: !unsent(err)}
}

var aadCode = regexp.MustCompile(`AADSTS[0-9]+`)

func judgeAnswer(status int, code string, raw *http.Response, local time.Time) verdict {
	e := &ServiceError{Status: status, Code: code}
	if raw != nil {
		e.RequestID = raw.Header.Get("x-ms-request-id")
		e.retryAfter = retryAfter(raw.Header, local)
	}
	c := bloberror.Code(code)
	e.Hint = hints[c]
	v := verdict{err: e, after: e.retryAfter}
	if kind, known := kinds[c]; known {
		e.Kind = kind
	} else if strings.HasPrefix(code, "Lease") {
		e.Kind = blobstore.ErrLeaseConflict
	} else if retriable[c] {
		v.again, v.throttle = true, c == bloberror.SnapshotOperationRateExceeded
		return v
	} else {
		switch {
		case code == featureMissing:
			return v
		case status == http.StatusUnauthorized:
			e.Kind = blobstore.ErrCredentials
		case status == http.StatusForbidden:
			e.Kind = blobstore.ErrPermission
		case status == http.StatusNotFound:
			e.Kind = blobstore.ErrNotFound
		case status == http.StatusPreconditionFailed:
			e.Kind = blobstore.ErrConditionFailed
		case status == http.StatusRequestedRangeNotSatisfiable || status == http.StatusRequestEntityTooLarge || status == http.StatusBadRequest:
			e.Kind = blobstore.ErrInvalid
		case status == http.StatusInsufficientStorage:
			e.Kind = blobstore.ErrFull
		case status == http.StatusTooManyRequests:
			v.again, v.throttle = true, true
		case status == http.StatusRequestTimeout, status == http.StatusInternalServerError, status == http.StatusBadGateway,
			status == http.StatusServiceUnavailable, status == http.StatusGatewayTimeout:
			v.again, v.maybe = true, true
			v.throttle = status == http.StatusServiceUnavailable || c == bloberror.OperationTimedOut
		}
	}
	if errors.Is(e.Kind, blobstore.ErrCredentials) {
		if off := skew(raw, local); off != "" {
			e.Kind, e.Hint = blobstore.ErrClockSkew, e.Hint+off
		}
	}
	return v
}

// maxSkew is what Azure tolerates of a signed request's date.
const maxSkew = 15 * time.Minute

// skew says how far this machine's clock is from the answer's.
func skew(raw *http.Response, local time.Time) string {
	if raw == nil {
		return ""
	}
	date, err := http.ParseTime(raw.Header.Get("Date"))
	if err != nil {
		return ""
	}
	off := local.Sub(date).Round(time.Second)
	switch {
	case off > maxSkew/3:
		return fmt.Sprintf("; this machine's clock is %s ahead of the storage's, which refuses more than %s", off, maxSkew)
	case off < -maxSkew/3:
		return fmt.Sprintf("; this machine's clock is %s behind the storage's, which refuses more than %s", -off, maxSkew)
	}
	return ""
}

// maxRetryAfter bounds what a service can ask us to wait.
const maxRetryAfter = 2 * time.Minute

func retryAfter(h http.Header, local time.Time) time.Duration {
	for name, unit := range map[string]time.Duration{"retry-after-ms": time.Millisecond, "x-ms-retry-after-ms": time.Millisecond, "Retry-After": time.Second} {
		v := h.Get(name)
		if v == "" {
			continue
		}
		if n, err := strconv.ParseInt(v, 10, 32); err == nil && n >= 0 {
			return min(time.Duration(n)*unit, maxRetryAfter)
		}
		if at, err := http.ParseTime(v); err == nil {
			return min(max(0, at.Sub(local)), maxRetryAfter)
		}
	}
	return 0
}

// transport strips the address from an error of net/http: with a SAS it is a secret.
func transport(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return fmt.Errorf("no answer from storage: %w", ue.Err)
	}
	var auth *azidentity.AuthenticationFailedError
	if errors.As(err, &auth) {
		return errors.New("no usable answer") // its text has whole requests
	}
	return fmt.Errorf("no answer from storage: %w", err)
}

// unsent tells whether the request surely never reached the service.
func unsent(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	return errors.As(err, &dns) || errors.As(err, &op) && (op.Op == "dial" || op.Op == "proxyconnect")
}

var (
	errShortAnswer = fmt.Errorf("the answer's body ended early: %w", io.ErrUnexpectedEOF)
	errDamaged     = errors.New("the answer's checksum is wrong")
)

// isContext tells whether err is the end of a context.
func isContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// statusOf returns the service's code and status, if it answered.
func codeOf(err error) (string, int) {
	var e *ServiceError
	if errors.As(err, &e) {
		return e.Code, e.Status
	}
	return "", 0
}
