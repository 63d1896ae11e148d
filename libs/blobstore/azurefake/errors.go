package azurefake

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// refusal is an answer that is an error of the service.
type refusal struct {
	status     int
	code       string
	message    string
	retryAfter time.Duration
	challenge  bool // WWW-Authenticate, for bearer tokens
	detail     string
}

func (r *refusal) Error() string { return fmt.Sprintf("%d %s: %s", r.status, r.code, r.message) }

func refuse(status int, code, message string) *refusal {
	return &refusal{status: status, code: code, message: message}
}

// The refusals, with status and code of "Common REST API error codes" and "Blob service error codes".
var (
	errAuthentication = refuse(403, "AuthenticationFailed", "The request's authentication is not valid; see the detail.")
	errNoAuth         = refuse(401, "NoAuthenticationInformation", "The request carries no credentials.")
	errPermission     = refuse(403, "AuthorizationPermissionMismatch", "The credentials do not allow this operation.")
	errOverwrite      = refuse(403, "UnauthorizedBlobOverwrite", "The credentials do not allow to overwrite a blob.")
	errNoKeyAccess    = refuse(403, "KeyBasedAuthenticationNotPermitted", "The account accepts no key based credentials.")

	errContainerNotFound = refuse(404, "ContainerNotFound", "There is no such container.")
	errBlobNotFound      = refuse(404, "BlobNotFound", "There is no such blob.")
	errContainerExists   = refuse(409, "ContainerAlreadyExists", "The container exists.")
	errContainerDeleting = refuse(409, "ContainerBeingDeleted", "The container is being deleted.")
	errBlobExists        = refuse(409, "BlobAlreadyExists", "The blob exists.")
	errBlobType          = refuse(409, "InvalidBlobType", "The blob is of another type.")
	errCondition         = refuse(412, "ConditionNotMet", "A condition of the request's headers is not met.")
	errNotModified       = refuse(304, "ConditionNotMet", "")
	errSequence          = refuse(412, "SequenceNumberConditionNotMet", "The condition on the sequence number is not met.")
	errSnapshots         = refuse(409, "SnapshotsPresent", "The blob has snapshots.")
	errImmutable         = refuse(409, "BlobImmutableDueToPolicy", "A policy makes the blob immutable.")
	errLegalHold         = refuse(409, "BlobImmutableDueToLegalHold", "A legal hold makes the blob immutable.")
	errPageRange         = refuse(416, "InvalidPageRange", "The page range is not valid for the blob.")
	errRange             = refuse(416, "InvalidRange", "The range is not valid for the blob's size.")
	errTooLarge          = refuse(413, "RequestBodyTooLarge", "The body is larger than the limit.")
	errNoLength          = refuse(411, "MissingContentLengthHeader", "Content-Length is missing.")
	errMD5               = refuse(400, "Md5Mismatch", "The body does not match Content-MD5.")
	errCRC               = refuse(400, "Crc64Mismatch", "The body does not match x-ms-content-crc64.")
	errBusy              = refuse(503, "ServerBusy", "The server is busy.")
	errBlobOverwritten   = refuse(409, "BlobOverwritten", "The blob was created anew since the previous snapshot.")
	errBlockList         = refuse(400, "InvalidBlockList", "The block list names a block that does not exist.")
	errBlockID           = refuse(400, "InvalidBlobOrBlock", "The block id does not fit those of the blob.")
	errNotImplemented    = refuse(501, "NotImplemented", "azurefake does not imitate this operation.")
)

func badHeader(name string) *refusal {
	return refuse(400, "InvalidHeaderValue", "The value of header "+name+" is not valid.")
}

func badQuery(name string) *refusal {
	return refuse(400, "InvalidQueryParameterValue", "The value of query parameter "+name+" is not valid.")
}

func missingHeader(name string) *refusal {
	return refuse(400, "MissingRequiredHeader", "Header "+name+" is missing.")
}

func authFailed(detail string) *refusal {
	r := *errAuthentication
	r.detail = detail
	return &r
}

type xmlError struct {
	XMLName xml.Name `xml:"Error"`
	Code    string
	Message string
	Detail  string `xml:"AuthenticationErrorDetail,omitempty"`
}

// send writes the refusal. A HEAD request and a 304 have no body, so the code is in the header only.
func (s *Server) send(w http.ResponseWriter, r *http.Request, e *refusal) {
	h := w.Header()
	h.Set("x-ms-error-code", e.code)
	if e.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int((e.retryAfter+time.Second-1)/time.Second)))
	}
	if e.challenge {
		h.Set("WWW-Authenticate", "Bearer authorization_uri=https://login.microsoftonline.com/"+TenantID+"/oauth2/authorize resource_id=https://storage.azure.com")
	}
	if r.Method == http.MethodHead || e.status == http.StatusNotModified {
		w.WriteHeader(e.status)
		return
	}
	body, err := xml.Marshal(xmlError{Code: e.code, Message: fmt.Sprintf("%s\nRequestId:%s\nTime:%s", e.message,
		h.Get("x-ms-request-id"), s.now().Format(time.RFC3339Nano)), Detail: e.detail})
	if err != nil {
		panic(err) // strings always marshal
	}
	body = append([]byte(xml.Header), body...)
	h.Set("Content-Type", "application/xml")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.status)
	_, _ = w.Write(body) // a client that is gone has nobody to tell
}
