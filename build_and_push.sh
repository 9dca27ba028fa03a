#!/usr/bin/env bash
# Builds the training image and pushes it to Amazon ECR, under a tag that no other build has. Progress goes to standard
# error; the last line on standard output is the image's URI with its digest:
#   image_uri=$(./build_and_push.sh --region us-west-2)
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: build_and_push.sh [options]

Builds the training image and pushes it to Amazon ECR, into a repository that is created when it is missing, under a
tag of its own: VERSION-gREVISION-CODE.BUILD, the last two digests of all that goes in. A build that is there is not
made again. The last line on standard output is the image's URI with its digest.

  --region REGION         AWS region (default: AWS_REGION, AWS_DEFAULT_REGION, or the profile's)
  --profile PROFILE       AWS profile (default: AWS_PROFILE, or the default credentials)
  --repository NAME       ECR repository (default: dreambooth-sm)
  --tag TAG               tag that moves to this build, as `latest` does (default: the package's version)
  --base-image IMAGE      base image instead of the Dockerfile's
  --build-arg NAME=VALUE  build argument of the Dockerfile, such as WITH_XFORMERS=1; may be repeated
  --secret id=ID,src=FILE
                          build secret: pip.conf (pip's settings) or hf_token (the model hub's token); may be repeated
  --engine ENGINE         docker or podman (default: the first of them on PATH)
  --dry-run               print what would be done, and change nothing
  --help                  print this text
USAGE
}

say() { echo "build_and_push: $*" >&2; }
fail() { say "error: $*"; exit 1; }

# advice TEXT: what helps against a failure whose output is TEXT, to follow its message; nothing for what is not known.
advice() {
  case $1 in
    *"no space left on device"*) echo "; free space with '$engine system prune', or give $engine a larger disk" ;;
    *"exec format error"*) echo "; nothing here runs programs for amd64: install the emulation of it" \
      "('$engine run --privileged --rm tonistiigi/binfmt --install amd64'), or build on an amd64 machine" ;;
    *"authorization token has expired"*) echo "; a login to a registry has expired: '$engine logout HOST', and try again" ;;
    *toomanyrequests*) echo "; log in to that registry ('$engine login'), or name a mirror of the base with --base-image" ;;
    *ExpiredToken* | *"token is expired"* | *"Token has expired"*) echo "; renew them, with 'aws sso login' for SSO" ;;
    *"permission denied"*".sock"*) echo "; join the group 'docker', or run this with sudo" ;;
    *"ing credentials - err"*) echo "; the credential helper does not work that ~/.docker/config.json names" \
      "(credsStore, credHelpers): mend it, or take it out there" ;;
  esac
}

# attempt WHAT COMMAND...: runs the command; a failure becomes one line, WHAT with the command's last line of error.
attempt() {
  local what=$1 error
  shift
  # The command keeps its standard output; its standard error is captured by way of descriptor 3.
  {
    error=$("$@" 2>&1 >&3 3>&-) \
      || fail "$what: $(grep -v '^[[:space:]]*$' <<<"$error" | tail -n 1)$(advice "$error")"
  } 3>&1
}

# add_build_arg NAME=VALUE, or NAME for the environment's value: fails for what must not be read in the history.
add_build_arg() {
  local name=${1%%=*} value=${1#*=}
  [[ $name =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] || fail "--build-arg takes NAME=VALUE, not '$name'"
  [[ $1 == *=* ]] || value=${!name-}
  build_args+=(--build-arg "$1")
  build_values+=("$name=$value")
  case $name in *_proxy | *_PROXY) return ;; esac # which Docker keeps out of the history
  if [[ $name == *TOKEN* || $name == *PASSWORD* || $value =~ ://[^/]*@ ]]; then
    fail "--build-arg $name holds a password, and the image's history would show it; pass it as a build secret:" \
      "--secret id=pip.conf,src=FILE with pip's settings, --secret id=hf_token,src=FILE with the model hub's token"
  fi
}

# name_build: sets `build_tag`, the tag that this build alone has.
name_build() {
  command -v python3 >/dev/null || fail "'python3' is not installed, or not on PATH"
  build_tag=$(attempt "cannot read what the image is made of" python3 -I launcher/aws/image_tags.py \
    "$version" "${revision%-dirty}" ${build_values[@]+"${build_values[@]}"})
}

# find_build: sets `digest` and `media_type` of the build in ECR; false where it is not there.
find_build() {
  local found
  if ! found=$(attempt "cannot look for $uri:$build_tag" aws ecr describe-images --repository-name "$repository" \
    --image-ids "imageTag=$build_tag" --query 'imageDetails[0].[imageDigest,imageManifestMediaType]' --output text 2>&1); then
    [[ $found == *ImageNotFoundException* ]] && return 1
    echo "$found" >&2 && exit 1
  fi
  read -r digest media_type <<<"$found"
}

# move_tag TAG: gives the build one more tag, which an earlier build may have; where tags are immutable, it keeps it.
move_tag() {
  local refused
  if refused=$(attempt "cannot give the build the tag $1" aws ecr put-image --repository-name "$repository" \
    --image-tag "$1" --image-digest "$digest" --image-manifest "$manifest" 2>&1 >/dev/null); then
    say "the tag $1 is that of this build"
  elif [[ $refused == *ImageTagAlreadyExistsException* ]]; then
    say "the tag $1 stays with an earlier build: the tags of '$repository' are immutable"
  elif [[ $refused != *ImageAlreadyExistsException* ]]; then
    echo "$refused" >&2 && exit 1
  fi
}

# find_builder: sets `build` to the command that makes plain Docker manifests, the only kind that SageMaker takes.
find_builder() {
  local version
  version=$("$engine" --version 2>/dev/null || true)
  build=("$engine" build)
  if [[ $version == *podman* ]]; then
    build+=(--format docker)
  elif "$engine" buildx version >/dev/null 2>&1; then
    # Into the local image store, whatever the builder; the store may be containerd's, which prefers OCI.
    build=("$engine" buildx build --output "type=docker,oci-mediatypes=false")
  elif [[ $version =~ ^Docker\ version\ ([0-9]+) ]] && ((BASH_REMATCH[1] >= 23)); then
    fail "this Docker can't build: install its buildx plugin (docker-buildx-plugin, or docker-buildx on Debian)"
  fi
  # Attestations would wrap the image in an index. The variable is Docker's --provenance=false, also where that is unknown.
  export DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1
}

# push_build: builds the image and pushes it under its own tag.
push_build() {
  local host=${uri%%/*} password refused log
  password=$(attempt "cannot get a login for ECR" aws ecr get-login-password)
  # ECR's credential helper keeps no logins: newer ones ignore this one, older ones refuse it, and all log in by themselves.
  export AWS_ECR_IGNORE_CREDS_STORAGE=true
  if ! refused=$(attempt "cannot log $engine in to $host" \
    "$engine" login --username AWS --password-stdin "$host" 2>&1 >/dev/null <<<"$password"); then
    [[ $refused == *"not implemented"* ]] || { echo "$refused" >&2 && exit 1; }
    say "the credential helper for $host keeps no logins, and logs in by itself"
  fi

  # Shown as it comes, and kept to find what helps.
  if ! log=$("${build[@]}" "--tag=$uri:$build_tag" . 2>&1 \
    | while IFS= read -r line || [[ $line ]]; do echo "$line" >&2 && echo "$line"; done); then
    fail "the build failed; its own messages are above$(advice "$log")"
  fi
  say "pushing $uri:$build_tag"
  if ! { refused=$(attempt "cannot push $uri:$build_tag" "$engine" push "$uri:$build_tag" 2>&1 >&4); } 4>&2; then
    # Somebody else built the same meanwhile.
    [[ $refused == *immutable* ]] || { echo "$refused" >&2 && exit 1; }
    say "$build_tag is there already"
  fi
}

region=${AWS_REGION:-${AWS_DEFAULT_REGION:-}}
repository=dreambooth-sm
tag=
dry_run=
engine=docker
command -v docker >/dev/null || ! command -v podman >/dev/null || engine=podman
build_args=() # as the builder takes them
build_values=()
while (($#)); do
  case $1 in
    --region | --profile | --repository | --tag | --base-image | --build-arg | --secret | --engine)
      [[ -n ${2-} ]] || fail "$1 needs a value"
      case $1 in
        --region) region=$2 ;;
        --profile) export AWS_PROFILE=$2 ;;
        --repository) repository=$2 ;;
        --tag) tag=$2 ;;
        --base-image) add_build_arg "BASE_IMAGE=$2" ;;
        --build-arg) add_build_arg "$2" ;;
        --secret) build_args+=(--secret "$2") ;;
        --engine) engine=$2 ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    --help) usage && exit ;;
    *) fail "unknown option '$1'; --help lists the options" ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' dreambooth_sm/__init__.py)
# Outside of a git checkout the image goes without a revision.
revision=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || true)
name_build
moving=("${tag:-$version}" latest)
find_builder
build+=(--platform linux/amd64 ${build_args[@]+"${build_args[@]}"}
  --build-arg "VERSION=$version" --build-arg "REVISION=${revision:-unknown}" --build-arg "BUILD=$build_tag")

if [[ $dry_run ]]; then
  echo "would create the ECR repository '$repository' in ${region:-the configured region} if it is missing"
  echo "would build: ${build[*]} ."
  echo "would push it as $build_tag, unless that is there, and move to it the tags: ${moving[*]}"
  exit
fi

for tool in "$engine" aws; do
  command -v "$tool" >/dev/null || fail "'$tool' is not installed, or not on PATH"
done
attempt "$engine is not running, or not yours to use" "$engine" version >/dev/null
region=${region:-$(aws configure get region || true)}
[[ $region ]] || fail "no AWS region: pass --region, or set one with 'aws configure'"
export AWS_REGION=$region AWS_DEFAULT_REGION=$region
account=$(attempt "no valid AWS credentials" aws sts get-caller-identity --query Account --output text)
say "account $account, region $region"

# ECR itself names the repository's host, so no partition's domain has to be known here.
describe=(aws ecr describe-repositories --repository-names "$repository" --query 'repositories[0].repositoryUri' --output text)
if ! uri=$(attempt "cannot read the ECR repository '$repository'" "${describe[@]}" 2>&1); then
  [[ $uri == *RepositoryNotFoundException* ]] || { echo "$uri" >&2 && exit 1; }
  say "creating the ECR repository '$repository'"
  uri=$(attempt "cannot create the ECR repository '$repository'" \
    aws ecr create-repository --repository-name "$repository" --image-scanning-configuration scanOnPush=true \
    --query repository.repositoryUri --output text)
  # Builds keep their tags, and stay; what somebody takes its last tag from goes.
  attempt "cannot set the lifecycle rule of '$repository'" \
    aws ecr put-lifecycle-policy --repository-name "$repository" --lifecycle-policy-text '{"rules": [{
      "rulePriority": 1, "description": "expire images that lost their tags",
      "selection": {"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": 14},
      "action": {"type": "expire"}}]}' >/dev/null
fi

docker_manifest=vnd.docker.distribution.manifest.v2+json
if find_build && [[ $media_type == *"$docker_manifest" ]]; then
  say "$build_tag is there already"
else
  push_build
  find_build || fail "ECR does not show $uri:$build_tag, which was pushed"
fi
[[ $media_type == *"$docker_manifest" ]] || fail "ECR holds $uri:$build_tag as $media_type, which" \
  "SageMaker refuses; build it with Docker's buildx plugin or with podman, which can be told to make plain Docker manifests"

manifest=$(attempt "cannot read the manifest of $uri:$build_tag" aws ecr batch-get-image --repository-name "$repository" \
  --image-ids "imageDigest=$digest" --query 'images[0].imageManifest' --output text)
for each in "${moving[@]}"; do
  move_tag "$each"
done
echo "$uri@$digest"
